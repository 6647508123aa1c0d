"""Activated LoRA (aLoRA, https://arxiv.org/abs/2504.12397): an adapter that acts from its invocation on.

An adapter with `alora_invocation_tokens` acts, in each row, on the tokens from the last occurrence of that sequence to
the end, and not at all in a row without it. What was computed before the invocation is then the base model's, and its
cache can be shared.

While such an adapter lies over a model, a pair of hooks on the model turns token ids into the part of the batch the
adapter acts on, so that every way of calling the model works. Shapes: N rows, T tokens, L tokens of the invocation.
"""

import inspect
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from veneer.config import LoraConfig, TaskType
from veneer.errors import ArgumentError, AttachError, VeneerWarning
from veneer.layers.attach import CHILD
from veneer.layers.part import Part
from veneer.layers.route import Prompt, Step
from veneer.model.overlay import Overlay, overlay_of
from veneer.model.row_order import layers_without_rows
from veneer.targets import Resolution

Offsets = Sequence[int | None]

NEVER = torch.iinfo(torch.int64).max  # the start of a row that is not invoked


def why_not_invoked(model: nn.Module, config: LoraConfig, resolution: Resolution) -> list[str]:
    """What speaks against an activated adapter on this model; warns of what is probably not meant."""
    if config.alora_invocation_tokens is None:
        return []
    field = "alora_invocation_tokens"
    problems = [
        f"{field}: {site.path} is a layer of kind {site.kind.name}; such an adapter goes on linear layers only"
        for site in resolution.sites
        if not site.kind.linear
    ]
    problems += [f"{field}: {problem}" for problem in layers_without_rows(model, resolution.sites)]
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        problems.append(f"{field}: an encoder and a decoder see different tokens; it is for causal language models")
    if config.task_type != TaskType.CAUSAL_LM:
        _warn(f"{field} is for causal language models; task_type is {config.task_type and str(config.task_type)!r}.")
    whole = [name for name, has in (("modules_to_save", resolution.saved), ("bias", resolution.biases)) if has]
    if whole:
        _warn(f"{' and '.join(whole)}: what is trained in full acts on every token, not from {field} on only.")
    return problems


def last_occurrence(ids_NT: Tensor, invocation: Sequence[int]) -> Tensor:
    """(N,): where in each row the last occurrence of a sequence starts, NEVER where there is none.

    >>> last_occurrence(torch.tensor([[5, 6, 1, 5, 6, 2], [1, 2, 3, 4, 5, 7]]), [5, 6]).tolist()[0]
    3
    """
    N, T = ids_NT.shape
    L = len(invocation)
    if T < L:
        return torch.full((N,), NEVER, device=ids_NT.device)
    windows = ids_NT.unfold(1, L, 1)
    hits = (windows == torch.tensor(invocation, device=ids_NT.device)).all(-1)
    positions = torch.arange(T - L + 1, device=ids_NT.device)
    last = torch.where(hits, positions, -1).amax(1)
    return torch.where(last < 0, NEVER, last)


@contextmanager
def prompted(
    overlay: Overlay, given: Mapping[str, Any], offsets: Offsets | None, *, generating: bool
) -> Iterator[None]:
    """Within the block, a call with these arguments by name, activated adapters know where they act.

    offsets  for each row, how many of its last tokens they act on; None for none of them

    Raises ArgumentError, or AttachError if the call has no token ids to look for the invocation in.
    """
    names = [step.name for step in overlay.route.plan if step.name in overlay.route.invoked]
    if offsets is not None and not names:
        raise ArgumentError("alora_offsets has no effect: no adapter with alora_invocation_tokens acts in this call.")
    if not names or (offsets is None and not generating):  # a single forward finds the invocation by itself
        yield
        return
    outside = overlay.route.prompt
    overlay.route.prompt = _prompt(overlay, names, given, offsets, generating=generating)
    try:
        yield
    finally:
        overlay.route.prompt = outside


def follow_invocations(model: nn.Module, overlay: Overlay) -> None:
    """Let the route know the activated adapters, and the model have its hooks while there are any."""
    invoked = frozenset(name for name, config in overlay.configs.items() if config.alora_invocation_tokens)
    overlay.route.set(invoked=invoked)
    hooked = any(hook is _enter for hook in model._forward_pre_hooks.values())
    if invoked and not hooked:
        model.register_forward_pre_hook(_enter, with_kwargs=True, prepend=True)
        model.register_forward_hook(_leave, with_kwargs=True, always_call=True)
    elif hooked and not invoked:
        _unhook(model)


def _unhook(model: nn.Module) -> None:
    # by what they are, not by handle: a copy of the model has the hooks and no handle to them
    for hooks, mine, flags in (
        (model._forward_pre_hooks, _enter, (model._forward_pre_hooks_with_kwargs,)),
        (model._forward_hooks, _leave, (model._forward_hooks_with_kwargs, model._forward_hooks_always_called)),
    ):
        for key in [key for key, hook in hooks.items() if hook is mine]:
            del hooks[key]
            for flag in flags:
                flag.pop(key, None)


def _enter(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a forward pass: place the activated adapters among its tokens."""
    overlay = overlay_of(model)
    if overlay is None:
        return
    route = overlay.route
    names = [step.name for step in route.plan if step.name in route.invoked]
    if not names:
        return
    given = arguments(model, args, kwargs)
    if overlay.route.prompt is None:
        prompt = _prompt(overlay, names, given, None, generating=False)
        _refuse_unseen(overlay, prompt, given)
        if model.training and torch.is_grad_enabled():
            _look_at_training(overlay, prompt, given)
    else:
        prompt = overlay.route.prompt
    _refuse_chosen_logits(model, given, names)
    positions_T = _positions(prompt, given)
    parts = {name: positions_T >= prompt.starts[name].unsqueeze(1) for name in names}
    route.plan = tuple(
        Step(step.name, Part(mask.shape[0], None if step.part is None else step.part.rows, mask))
        if (mask := parts.get(step.name)) is not None
        else step
        for step in route.plan
    )


def _leave(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """After it, also after an error: no part of the model knows tokens any more."""
    overlay = overlay_of(model)
    if overlay is not None:
        overlay.route.plan = tuple(
            overlay.route.step(step.name, step.part) if step.name in overlay.route.invoked else step
            for step in overlay.route.plan
        )


def arguments(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], *, generating: bool = False
) -> dict[str, Any]:
    """All arguments of a call by name."""
    if not args:
        return dict(kwargs)
    if generating:
        return {"inputs": args[0], **kwargs}
    parameters = inspect.signature(model.forward).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    names += [f"argument {i}" for i in range(len(names), len(args))]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _prompt(
    overlay: Overlay, names: Iterable[str], given: Mapping[str, Any], offsets: Offsets | None, *, generating: bool
) -> Prompt:
    if generating and given.get("guidance_scale") not in (None, 1):
        raise AttachError(
            "guidance_scale runs the model over a second text, in which an adapter with alora_invocation_tokens would "
            "not know its place: leave it out, or use an adapter that acts everywhere."
        )
    ids, embedded = _tokens_of(given)
    seen = embedded if embedded is not None else ids
    if seen is None or (offsets is None and (ids is None or ids.shape[1] != seen.shape[1])):
        raise AttachError(
            f"Adapter {next(iter(names))!r} acts from its alora_invocation_tokens on, and there are no input_ids to "
            "find them in: pass input_ids, or alora_offsets with how many of its last tokens it acts on in each row "
            "(None for none)."
        )
    T = seen.shape[1]
    if offsets is not None:
        starts = _starts(offsets, seen)
        return Prompt(dict.fromkeys(names, starts), T, generating)
    assert ids is not None
    found = {name: last_occurrence(ids, overlay.configs[name].alora_invocation_tokens or ()) for name in names}
    return Prompt(found, T, generating)


def _starts(offsets: Offsets, seen: Tensor) -> Tensor:
    """(N,): where the last tokens that offsets count begin."""
    N, T = seen.shape[:2]
    if not isinstance(offsets, list | tuple) or len(offsets) != N:
        raise ArgumentError(
            f"alora_offsets must be a list with one entry for each of the {N} rows: a number of tokens, or None; "
            f"it is {offsets!r}."
        )
    wrong = [v for v in offsets if v is not None and (isinstance(v, bool) or not isinstance(v, int) or v < 0)]
    if wrong:
        raise ArgumentError(f"alora_offsets counts tokens from the end of a row, so {wrong[0]!r} cannot be meant.")
    return torch.tensor([NEVER if not v else max(T - v, 0) for v in offsets], device=seen.device)


def _tokens_of(given: Mapping[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    """(token ids (N, T), embeddings (N, T, ...)) of a call, each None if it has none."""
    embedded = given.get("inputs_embeds")
    first = None if embedded is not None else next(iter(given.values()), None)
    candidates = (given.get("input_ids"), given.get("inputs"), first)
    found = next((value for value in candidates if isinstance(value, Tensor)), None)
    is_ids = found is not None and found.dim() == 2 and found.shape[1] > 0 and not found.is_floating_point()
    return found if is_ids else None, embedded


def _positions(prompt: Prompt, given: Mapping[str, Any]) -> Tensor:
    """(T,): the index of each token of this forward pass, in the row that the prompt begins."""
    ids, embedded = _tokens_of(given)
    seen = embedded if embedded is not None else ids
    assert seen is not None
    T = seen.shape[1]
    positions = torch.arange(T, device=seen.device)
    if not prompt.generating:
        return positions
    past = _past(given)
    if past is None:  # no cache that counts: the whole row again, or what follows it
        past = 0 if prompt.tokens <= T else prompt.tokens
    return positions + past


def _past(given: Mapping[str, Any]) -> Any:
    """How many tokens of the rows the cache holds; None if there is none, or it does not count them."""
    cache = given.get("past_key_values")
    try:
        return None if cache is None else cache.get_seq_length()
    except (AttributeError, ValueError):  # of a state-space model
        return None


def _refuse_chosen_logits(model: nn.Module, given: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raise AttachError if an adapted output head would see tokens that are not the last ones in order."""
    chosen = given.get("logits_to_keep")
    if isinstance(chosen, Tensor) and chosen.dim():
        head = model.get_output_embeddings()  # type: ignore[operator]
        if any(name in getattr(head, CHILD, ()) for name in names):
            raise AttachError(
                "logits_to_keep names single tokens, and the adapted output head cannot tell on which of them it acts: "
                "pass a number of last tokens."
            )


def _refuse_unseen(overlay: Overlay, prompt: Prompt, given: Mapping[str, Any]) -> None:
    """Raise AttachError if the invocation may be among tokens that only the cache has seen."""
    if not _past(given):
        return
    for name, count in _uninvoked(overlay, prompt).items():
        if count:
            raise AttachError(
                f"Adapter {name!r}: {count} row(s) have no alora_invocation_tokens in these input_ids, but may have "
                "had them in the tokens of the cache. Pass alora_offsets with how many of its last tokens it acts on "
                "in each row, None for none. (To generate, call generate of the PeftModel, which sees the prompt.)"
            )


def _look_at_training(overlay: Overlay, prompt: Prompt, given: Mapping[str, Any]) -> None:
    """Warn of rows that train nothing; raise AttachError for rows packed into one."""
    positions = given.get("position_ids")
    packed = any(given.get(name) is not None for name in ("cu_seq_lens_q", "seq_idx"))
    if isinstance(positions, Tensor) and positions.dim() == 2 and not packed:
        restarts = ((positions[:, 1:] == 0) & (positions[:, :-1] > 0)).any(1)
        packed = bool((restarts & (positions[:, 0] == 0)).any())
    if packed:
        raise AttachError(
            "Several rows are packed into one, and of those an adapter with alora_invocation_tokens would see the last "
            "one's only: train without packing."
        )
    for name, count in _uninvoked(overlay, prompt).items():
        if count:
            _warn(
                f"Adapter {name!r}: {count} row(s) of this batch lack its alora_invocation_tokens "
                f"{overlay.configs[name].alora_invocation_tokens}, so it learns nothing from them. (Is the text that "
                "invokes it split into other tokens here?)"
            )


def _uninvoked(overlay: Overlay, prompt: Prompt) -> dict[str, int]:
    """How many of its rows each activated adapter does not act in."""
    rows = {step.name: None if step.part is None else step.part.rows for step in overlay.route.plan}
    counts = {}
    for name, starts in prompt.starts.items():
        mine = starts if rows[name] is None else starts[rows[name]]
        counts[name] = int((mine == NEVER).sum())
    return counts


def _warn(text: str) -> None:
    warnings.warn(text, VeneerWarning, stacklevel=6)
