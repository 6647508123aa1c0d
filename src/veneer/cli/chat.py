"""`veneer chat`: talk to a model, with or without an adapter."""

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from veneer.train.data import Message

COMMANDS = "/new starts over, /system TEXT sets the system message and starts over, /quit ends"


def chat(
    model: Annotated[str, typer.Argument(help="A model (hub id or folder), or an adapter folder.")],
    adapter: Annotated[str | None, typer.Option(help="An adapter for the model.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Ask this once and end.")] = None,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 512,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 gives the most likely answer; higher ones vary more.")
    ] = 0.0,
) -> None:
    """Talk to a model, answers appear as they are made.

    Example: [bold]veneer chat runs/first/adapter --prompt "2 + 2?"[/bold]

    An adapter folder is enough: the model is the one it was trained on. Questions can also be piped in, one a line.
    """
    from veneer.errors import RunError
    from veneer.train.adapted import is_adapter, load_adapted
    from veneer.train.load import device, load_model, load_tokenizer
    from veneer.train.quiet import quiet

    with quiet():
        if adapter or is_adapter(model):
            loaded = load_adapted(adapter or model, base=model if adapter else None)
            speaker: Any = loaded.model
            tokenizer = loaded.tokenizer
        else:
            speaker, tokenizer = load_model(model), load_tokenizer(model)
        speaker.to(device()).eval()
        talk = Talk(speaker, tokenizer, max_new_tokens, temperature, system)
        if prompt is not None:
            talk.answer(prompt)
            return
        for line in _questions():
            try:
                if not talk.obey(line):
                    talk.answer(line)
            except RunError as error:  # too long: what was said stays, and the user goes on
                typer.echo(str(error), err=True)


def _questions() -> Iterator[str]:
    """Lines from the terminal or a pipe, up to /quit."""
    terminal = sys.stdin.isatty()
    if terminal:
        typer.echo(COMMANDS)
    while True:
        try:
            line = input("> " if terminal else "").strip()
        except EOFError:
            return
        if line == "/quit":
            return
        if line:
            yield line


class Talk:
    """A conversation: what was said so far, and the model that answers."""

    def __init__(
        self,
        model: Any,
        tokenizer: "PreTrainedTokenizerBase",
        max_new_tokens: int,
        temperature: float,
        system: str | None,
    ):
        self.model, self.tokenizer = model, tokenizer
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self.system = system
        self.said: list[Message] = []
        self.start_over()

    def start_over(self) -> None:
        """Forget everything but the system message."""
        from veneer.train.data import Message

        self.said = [Message("system", self.system)] if self.system else []

    def obey(self, line: str) -> bool:
        """Whether the line was a command, which is then done."""
        if line == "/new":
            self.start_over()
            return True
        if line.startswith("/system "):
            self.system = line.removeprefix("/system ").strip()
            self.start_over()
            return True
        if line.startswith("/"):
            typer.echo(COMMANDS, err=True)
            return True
        return False

    def answer(self, question: str) -> str:
        """Print the answer while it is made, and remember it."""
        import torch
        from transformers import TextStreamer

        from veneer.train.data import Message
        from veneer.train.tokens import render_prompt, stop_ids

        said = [*self.said, Message("user", question)]
        inputs = self.tokenizer(
            render_prompt(said, self.tokenizer),
            add_special_tokens=self.tokenizer.chat_template is None,
            return_tensors="pt",
        ).to(self.model.device)
        room = self._room(inputs["input_ids"].shape[1])
        sampling = {"do_sample": True, "temperature": self.temperature} if self.temperature else {"do_sample": False}
        with torch.inference_mode():
            ids = self.model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=min(self.max_new_tokens, room),
                eos_token_id=stop_ids(self.model, self.tokenizer),
                pad_token_id=self.tokenizer.pad_token_id,
                streamer=TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True),
                **sampling,
            )
        text = str(self.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
        if ids.shape[1] - inputs["input_ids"].shape[1] == room < self.max_new_tokens:
            typer.echo("Note: the answer ends where the model can read no more.", err=True)
        self.said = [*said, Message("assistant", text)]
        return text

    def _room(self, prompt: int) -> int:
        """How many tokens an answer to so many can have; RunError if none."""
        from veneer.errors import RunError
        from veneer.train.load import positions

        limit = positions(self.model)
        if limit is None:
            return self.max_new_tokens
        if prompt >= limit:
            raise RunError(
                f"The conversation has {prompt} tokens, and the model can read at most {limit} at once, its answer "
                "included. Start over with /new, or ask something shorter."
            )
        return limit - prompt
