"""What a model's modules see of a text, beside the hidden states that transformers gives out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from pipeline.ground.calibration import HELD_ROWS, Moments, cut, num_fitted, watch
from tests.tolerance import FLOAT32_SUM

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 96}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}


def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL)).eval()


def tokens(sequences: int, length: int = 48) -> torch.Tensor:
    return torch.randint(96, (sequences, length), generator=torch.Generator().manual_seed(2))


def all_widths(model: Any) -> dict[str, int]:
    return {name: m.in_features for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}


def watched(
    model: Any, sequences: torch.Tensor, workers: int = 1, memory: int = 1 << 30
) -> dict[str, tuple[list[str], Moments]]:
    found = list(watch(model, all_widths(model), sequences, workers, memory))
    return {modules[0]: (modules, moments) for modules, moments in found}


def test_modules_that_are_given_the_same_tensor_share_its_moments() -> None:
    found = [modules for modules, _ in watched(llama(), tokens(8)).values()]
    wanted = []
    for layer in range(2):
        at = f"model.layers.{layer}"
        wanted += [[f"{at}.self_attn.{x}_proj" for x in "qkv"], [f"{at}.self_attn.o_proj"]]
        wanted += [[f"{at}.mlp.gate_proj", f"{at}.mlp.up_proj"], [f"{at}.mlp.down_proj"]]
    assert found == [*wanted, ["lm_head"]]


def test_moments_are_those_of_the_hidden_states() -> None:
    model, sequences = llama(), tokens(19)
    found = watched(model, sequences)
    with torch.no_grad():
        hidden = model(input_ids=sequences, output_hidden_states=True).hidden_states
        seen = {
            "model.layers.1.self_attn.q_proj": model.model.layers[1].input_layernorm(hidden[1]),
            "lm_head": hidden[-1],
        }
    fitted = [n for n in range(19) if n % 8 != 7]
    for name, X in seen.items():
        moments = found[name][1]
        x = X[fitted].double().flatten(0, 1)
        assert moments.rows == len(x) == num_fitted(19, 48)
        scale = (x.T @ x).diagonal().sqrt()
        assert bool(((moments.C - x.T @ x).abs() < FLOAT32_SUM * scale[:, None] * scale).all())
        held = torch.cat(moments.held)
        assert float((held - X[[7, 15]].flatten(0, 1)).abs().max()) < FLOAT32_SUM * float(X.abs().max())


def test_inputs_held_out_are_spread_and_bounded() -> None:
    found = watched(llama(), tokens(130, 48))["lm_head"][1]
    assert found.passed == 16 * 48
    assert 0.5 * HELD_ROWS <= len(torch.cat(found.held)) <= HELD_ROWS


@pytest.mark.parametrize(("workers", "memory"), [(3, 1 << 30), (1, 1), (2, 100_000)])
def test_neither_workers_nor_memory_change_a_bit(workers: int, memory: int) -> None:
    model, sequences = llama(), tokens(11)
    one, other = watched(model, sequences), watched(model, sequences, workers, memory)
    assert one.keys() == other.keys()
    for name, (modules, moments) in one.items():
        assert other[name][0] == modules
        assert torch.equal(other[name][1].C, moments.C)
        assert torch.equal(torch.cat(other[name][1].held), torch.cat(moments.held))


def test_a_module_that_is_called_for_some_tokens_only_has_their_moments() -> None:
    class Routed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.all, self.some, self.never = (torch.nn.Linear(4, 4) for _ in range(3))
            self.device = torch.device("cpu")

        def forward(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
            x = torch.nn.functional.one_hot(input_ids % 4, 4).float()
            self.some(x[input_ids < 30])
            found: torch.Tensor = self.all(x)
            return found

    sequences = tokens(9)
    found = watched(Routed(), sequences)
    fitted = torch.cat([sequences[:7], sequences[8:]])
    assert found["all"][1].rows == fitted.numel()
    assert found["some"][1].rows == int((fitted < 30).sum())
    assert torch.equal(
        found["some"][1].C.diagonal(), torch.bincount(fitted[fitted < 30] % 4, minlength=4).double()
    )
    assert found["never"][1].rows == 0


def test_hooks_are_gone_afterwards() -> None:
    model = MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=3)).eval()
    watched(model, tokens(8))
    assert not [name for name, m in model.named_modules() if m._forward_pre_hooks]


def test_text_is_cut_into_whole_sequences() -> None:
    assert cut(range(10), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
