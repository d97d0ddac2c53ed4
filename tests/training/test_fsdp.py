"""A model in shards (FSDP2) over two processes of a CPU equals the whole model in one."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from drt import DRTForCausalLM
from drt.baselines import BlockRecurrentConfig, BlockRecurrentForCausalLM
from drt.layers import DRTDecoderLayer, DRTEncoderLayer
from drt.testing import tiny_config
from drt.training.optimizer import MuonWithAdamW, split_parameters

from .processes import run_processes

IDS = (4, 80)


def make_model(tied: bool = False) -> DRTForCausalLM:
    torch.manual_seed(0)
    # The chunked head and the encoder have parameters outside of the layers.
    config = tiny_config(loss_chunk_size=32, retrieval_noise=0.0, tie_word_embeddings=tied)
    return DRTForCausalLM(config).train()


def shard(model: DRTForCausalLM) -> None:
    for module in model.modules():
        if isinstance(module, (DRTDecoderLayer, DRTEncoderLayer)):
            fully_shard(module)
    fully_shard(model)


def make_optimizer(model: DRTForCausalLM, name: str) -> torch.optim.Optimizer:
    if name == "adamw":
        # Large against the gradients' rounding, which the division would blow up.
        return torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4)
    matrices, others = split_parameters(model)
    return MuonWithAdamW(matrices, others, lr=1e-3, weight_decay=0.01, betas=(0.9, 0.95))


def train_steps(
    model: DRTForCausalLM, optimizer: torch.optim.Optimizer, rows: slice, steps: range
) -> list[list[float]]:
    """Losses of this process's rows, and gradient norms of all before they are clipped."""
    seen = []
    for step in steps:
        ids = torch.randint(0, 61, IDS, generator=torch.Generator().manual_seed(step))[rows]
        loss = model(ids, labels=ids).loss
        loss.backward()
        norm: Any = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
        seen.append([loss.item(), whole.item()])
    return seen


def half(rank: int) -> slice:
    return slice(2 * rank, 2 * rank + 2)


def whole_weights(model: DRTForCausalLM) -> dict[str, Any]:
    return get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )


def in_two(work: Any, folder: Path) -> None:
    """Run `work(rank)` in two processes of one group."""

    def joined(rank: int) -> None:
        dist.init_process_group("gloo")
        work(rank)
        dist.destroy_process_group()

    codes = run_processes(joined, 2, folder)
    assert codes == [0, 0], (folder / "rank0.txt").read_text()


@pytest.mark.parametrize(("name", "tied"), [("adamw", False), ("adamw", True), ("muon", False)])
def test_three_steps_are_those_of_one_process(name: str, tied: bool, tmp_path: Path) -> None:
    def work(rank: int) -> None:
        model = make_model(tied)
        shard(model)
        seen = train_steps(model, make_optimizer(model, name), half(rank), range(3))
        torch.save((seen, whole_weights(model)), tmp_path / f"{rank}.pt")

    in_two(work, tmp_path)
    model = make_model(tied)
    wanted = train_steps(model, make_optimizer(model, name), slice(None), range(3))
    (first, found), (second, _) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for one, other, both in zip(first, second, wanted, strict=True):
        # Sums of float32 in another order, some 1e-7 of themselves a product.
        assert (one[0] + other[0]) / 2 == pytest.approx(both[0], rel=1e-5)
        assert one[1] == other[1] == pytest.approx(both[1], rel=1e-4)
    # Three steps of 1e-3; Muon's matrices are orthogonalized in bfloat16, of 8 bits.
    atol = 1e-6 if name == "adamw" else 3 * 1e-3 * 2**-6
    for key, value in model.state_dict().items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=atol)


def test_reading_works_in_shards(tmp_path: Path) -> None:
    ids = torch.randint(0, 61, (1, 80), generator=torch.Generator().manual_seed(5))

    def read(model: DRTForCausalLM) -> torch.Tensor:
        model.eval()
        state = model.new_state()
        model.read(ids[:, :-1], state, segment_size=32)
        with torch.no_grad():
            return model(ids[:, -1:], past_key_values=state).logits

    def work(rank: int) -> None:
        model = make_model()
        shard(model)
        register_fsdp_forward_method(model, "read")
        torch.save(read(model), tmp_path / f"{rank}.pt")

    in_two(work, tmp_path)
    for rank in range(2):
        # The very same operations on the very same numbers.
        assert torch.equal(torch.load(tmp_path / f"{rank}.pt"), read(make_model()))


def test_a_recurrent_baseline_reads_in_shards(tmp_path: Path) -> None:
    ids = torch.randint(0, 61, (1, 80), generator=torch.Generator().manual_seed(5))
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}

    def made() -> BlockRecurrentForCausalLM:
        torch.manual_seed(0)
        own = {"num_attention_heads": 4, "sliding_window": 19, "num_state_vectors": 6}
        return BlockRecurrentForCausalLM(BlockRecurrentConfig(**sizes, **own)).eval()

    @torch.no_grad()
    def read(model: BlockRecurrentForCausalLM) -> torch.Tensor:
        state = model(ids[:, :50], use_cache=True).past_key_values
        return model(ids[:, 50:], past_key_values=state).logits

    def work(rank: int) -> None:
        model = made()
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        torch.save(read(model), tmp_path / f"{rank}.pt")

    in_two(work, tmp_path)
    for rank in range(2):
        assert torch.equal(torch.load(tmp_path / f"{rank}.pt"), read(made()))


@pytest.mark.parametrize("name", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
def test_a_checkpoint_of_two_processes_goes_on_in_two_and_in_one(name: str, tmp_path: Path) -> None:
    saved = tmp_path / "saved"

    def go_on(model: DRTForCausalLM, rows: slice) -> list[list[float]]:
        optimizer = make_optimizer(model, name)
        weights, state = get_state_dict(model, optimizer)
        dcp.load({"model": weights, "optimizer": state}, checkpoint_id=saved)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
        return train_steps(model, optimizer, rows, range(2, 4))

    def work(rank: int) -> None:
        model = make_model()
        shard(model)
        optimizer = make_optimizer(model, name)
        train_steps(model, optimizer, half(rank), range(2))
        weights, state = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=saved)
        wanted = train_steps(model, optimizer, half(rank), range(2, 4))
        # Other weights, so that nothing but the checkpoint can lead to the same.
        other = DRTForCausalLM(make_model().config).train()
        shard(other)
        assert go_on(other, half(rank)) == wanted
        torch.save(wanted, tmp_path / f"{rank}.pt")

    in_two(work, tmp_path)
    found = go_on(DRTForCausalLM(make_model().config).train(), slice(None))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for one, other, both in zip(first, second, found, strict=True):
        # As above; after a step of Muon, whose matrices are orthogonalized in bfloat16.
        assert (one[0] + other[0]) / 2 == pytest.approx(
            both[0], rel=1e-5 if name == "adamw" else 1e-4
        )
        assert one[1] == pytest.approx(both[1], rel=1e-4 if name == "adamw" else 1e-2)
