"""Run by torchrun: `train` under DeepSpeed's ZeRO 2 and 3, as their profiles ask for it, on CPU processes.

torchrun --nproc-per-node 2 zero_runs.py FOLDER     runs of one process lie there already
"""

import json
import os
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env

import tiny
import veneer
from distributed.zero_cases import CASES, COMMON, HALVES
from train import tiny_chat
from train.tiny_run import settings
from veneer.errors import AttachError, RunError, VeneerError
from veneer.model.hotswap import hotswap_adapter_from_state_dict
from veneer.train import run
from veneer.train.launch import profile_file
from veneer.train.ranks import join


def as_the_profile_says(profile: str) -> None:
    """The environment that `--launch PROFILE` gives each process."""
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]
    words = ["--config_file", str(profile_file(profile)), "--num_processes", "2", "--main_process_port", "0", "x.py"]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    handed = prepare_deepspeed_cmd_env(args)[1]
    os.environ.update({name: value for name, value in handed.items() if name.startswith("ACCELERATE_")})


def main(folder: Path) -> None:
    model, rows = folder / "model", folder / "rows.jsonl"
    trainers = []
    inner = run.build_trainer

    def watched(*args, **options):
        trainers.append(inner(*args, **options))
        return trainers[-1]

    def trained(name: str, **changes) -> None:
        top = {key: changes.pop(key) for key in ("dtype", "quantization") if key in changes}
        run.train(settings(model, rows, folder / name, **{**COMMON, **changes}).model_copy(update=top))

    run.build_trainer = watched
    for stage in (2, 3):
        # own.yaml is deepspeed-zero3, but so that nothing is small enough to be left whole
        profile = "deepspeed-zero2" if stage == 2 else str(folder / "own.yaml")
        as_the_profile_says(profile)
        for name, changes in CASES.items():
            if stage in changes["stages"]:
                trained(f"zero{stage}-{name}", **changes["settings"])
        if stage == 3:
            away = [name for name, p in trainers[-1].model.named_parameters() if p.ds_status.name != "NOT_AVAILABLE"]
            assert not away, away
        assert join().count == 2
        trained(f"zero{stage}-begun", **HALVES[0])
        refused(lambda: trained("bad", optimizer="lorafa"), "LoRA-FA needs the A and B of each layer")
    copies = {"lora": {"modules_to_save": ["lm_head"]}}
    refused(lambda: trained("bad", dtype="bfloat16", **copies), "trains parameters of one dtype")
    refused(lambda: trained("bad", lora={"init_lora_weights": "loftq"}), "exchanges weights of the base")
    refused(lambda: trained("bad", quantization="nf4"), "ZeRO-3 cannot cut such weights into shards")
    trained("zero2-begun", **HALVES[1])  # what ZeRO 2 began
    trained("one-begun", **HALVES[1])  # what one process began, with the optimizer's state whole
    as_the_profile_says("deepspeed-zero2")
    trained("one-begun-too", **HALVES[1])
    assert not (folder / "bad").exists()


def refused(act, said: str, error: type[Exception] = RunError) -> None:
    with pytest.raises(error) as caught:
        act()
    assert said in str(caught.value) or "says what is wrong" in str(caught.value), caught.value


def by_hand(folder: Path) -> None:
    """A loop of one's own: a base that ZeRO 3 has partitioned, adapted, and taken over by `deepspeed.initialize`."""
    import deepspeed  # type: ignore
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    rank = dist.get_rank()
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": json.loads((folder / "own.json").read_text())["zero_optimization"],
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # which is 1.0 unless said
    }
    lora = {"r": 4, "target_modules": ["q_proj", "embed_tokens"], "use_dora": True, "modules_to_save": ["lm_head"]}
    whole = veneer.get_peft_model(tiny_chat.model(), veneer.LoraConfig(**lora))
    told = HfDeepSpeedConfig(config)  # transformers partitions what it loads as long as this is there
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    del told
    spread = veneer.get_peft_model(base, veneer.LoraConfig(**lora))
    tiny.shake(whole)
    veneer.set_peft_model_state_dict(spread, veneer.get_peft_model_state_dict(whole))
    assert sum(p.numel() for p in base.parameters()) < sum(p.numel() for p in whole.parameters())
    assert spread.get_nb_trainable_parameters() == whole.get_nb_trainable_parameters()

    ids = torch.randint(3, 200, (4, 10), generator=torch.Generator().manual_seed(3))
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], 0.1) for m in (whole, spread)]
    engine, *_ = deepspeed.initialize(model=spread.train(), optimizer=optimizers[1], config=config)
    whole.train()(input_ids=ids, labels=ids).loss.backward()
    optimizers[0].step()
    mine = ids[2 * rank : 2 * rank + 2]
    engine.backward(engine(input_ids=mine, labels=mine).loss)
    engine.step()
    for name, value in veneer.get_peft_model_state_dict(whole).items():
        torch.testing.assert_close(veneer.get_peft_model_state_dict(spread)[name], value, rtol=1e-5, atol=1e-6)
    spread.save_pretrained(folder / "by-hand")
    dist.barrier()
    again = veneer.PeftModel.from_pretrained(tiny_chat.model(), folder / "by-hand")
    engine.eval()
    with torch.no_grad():
        expected, found = whole.eval()(input_ids=ids).logits, engine(input_ids=ids).logits
    torch.testing.assert_close(again(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    refused(lambda: spread.add_adapter("late", veneer.LoraConfig(r=2)), "has taken over", AttachError)
    refused(spread.merge_and_unload, "the model is sharded", VeneerError)


def loaded_after(stage: int) -> None:
    """Values that are loaded after `deepspeed.initialize` are what the next step starts from."""
    import deepspeed  # type: ignore

    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
    }
    lora = veneer.LoraConfig(r=4, target_modules=["q_proj"])
    whole, spread = (veneer.get_peft_model(tiny_chat.model(), lora) for _ in range(2))
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], 0.1) for m in (whole, spread)]
    engine, *_ = deepspeed.initialize(model=spread.train(), optimizer=optimizers[1], config=config)
    ids, rank = torch.randint(3, 200, (4, 10), generator=torch.Generator().manual_seed(3)), dist.get_rank()
    mine = ids[2 * rank : 2 * rank + 2]
    for turn in range(2):
        draw = torch.Generator().manual_seed(turn)
        values = veneer.get_peft_model_state_dict(whole)
        new = {key: 0.1 * torch.randn(value.shape, generator=draw) for key, value in values.items()}
        for model in (whole, spread):
            veneer.set_peft_model_state_dict(model, new)
        optimizers[0].zero_grad()
        whole.train()(input_ids=ids, labels=ids).loss.backward()
        optimizers[0].step()
        engine.backward(engine(input_ids=mine, labels=mine).loss)
        engine.step()
        found = veneer.get_peft_model_state_dict(spread)
        if stage < 3:
            swap = partial(hotswap_adapter_from_state_dict, spread, new, "default", lora)
            refused(swap, "steps copies", AttachError)
        for name, value in veneer.get_peft_model_state_dict(whole).items():
            assert not torch.equal(value, new[name])
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


if __name__ == "__main__":
    from veneer.distributed.gloo import wait_for_gloo

    warnings.filterwarnings("ignore", category=FutureWarning)  # what DeepSpeed calls of torch
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
    by_hand(Path(sys.argv[1]))
    for stage in (1, 2, 3):
        loaded_after(stage)
    dist.barrier()
    dist.destroy_process_group()
    wait_for_gloo()
