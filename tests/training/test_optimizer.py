"""Muon and AdamW as one optimizer."""

import pytest
import torch
from torch.optim import AdamW, Muon

from drt import DRTForCausalLM
from drt.baselines import BlockRecurrentConfig, BlockRecurrentForCausalLM
from drt.testing import tiny_config
from drt.training.optimizer import MuonWithAdamW, split_parameters


def made(model: torch.nn.Module) -> MuonWithAdamW:
    matrices, others = split_parameters(model)
    return MuonWithAdamW(matrices, others, lr=0.1, weight_decay=0.01, betas=(0.9, 0.95))


def test_every_parameter_is_in_one_part() -> None:
    for tied in (True, False):
        model = DRTForCausalLM(tiny_config(tie_word_embeddings=tied))
        matrices, others = split_parameters(model)
        together = sorted(id(p) for p in [*matrices, *others])
        assert together == sorted({id(p) for p in model.parameters()})
        apart = {id(model.model.embed_tokens.weight), id(model.lm_head.weight)}
        assert not apart & {id(p) for p in matrices}
        assert all(p.dim() == 2 for p in matrices)


def test_vectors_that_are_learned_one_by_one_are_no_matrix() -> None:
    config = BlockRecurrentConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    model = BlockRecurrentForCausalLM(config)
    matrices, others = split_parameters(model)
    rows = model.model.layers[1].states
    assert {id(rows.initial), id(rows.ids)} <= {id(p) for p in others}
    assert id(rows.q_proj.weight) in {id(p) for p in matrices}


def test_a_step_is_a_step_of_both_parts() -> None:
    torch.manual_seed(0)
    ours, theirs = (DRTForCausalLM(tiny_config()) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    ids = torch.randint(0, 61, (1, 40))
    for model in (ours, theirs):
        model(ids, labels=ids).loss.backward()
    made(ours).step()
    matrices, others = split_parameters(theirs)
    Muon(matrices, lr=0.1, weight_decay=0.01, adjust_lr_fn="match_rms_adamw").step()
    for decay, dims in ((0.01, (2,)), (0.0, (1,))):
        part = [p for p in others if p.dim() in dims]
        AdamW(part, lr=0.1, betas=(0.9, 0.95), weight_decay=decay, fused=True).step()
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


def test_a_scheduler_reaches_both_parts_also_after_loading() -> None:
    optimizer = made(DRTForCausalLM(tiny_config()))
    optimizer.load_state_dict(optimizer.state_dict())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    optimizer.step()
    scheduler.step()
    rates = [g["lr"] for part in (optimizer.muon, optimizer.adamw) for g in part.param_groups]
    assert rates == [0.05] * len(rates)


def test_a_closure_is_refused() -> None:
    with pytest.raises(ValueError, match="no closure"):
        made(DRTForCausalLM(tiny_config())).step(lambda: 0.0)
