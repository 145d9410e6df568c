"""4-bit weights dequantize to what their codes and scales say, and layers that a CPU computes wrongly are refused."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from bitsandbytes.functional import create_normal_map, quantize_4bit

from qlora_kit.base_files import resolve_base
from qlora_kit.config import QuantizationSection
from qlora_kit.errors import BaseModelError
from qlora_kit.four_bit import dequantize
from qlora_kit.models import load_base_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SHAPES = [(64, 64), (64, 96), (8, 272), (128, 32), (3, 64), (1, 100), (5, 7 * 64 + 2)]


@pytest.mark.parametrize("shape", SHAPES)
def test_weights_are_code_times_scale_for_every_width(shape: tuple[int, int]) -> None:
    """By the definition: code book [code] x block scale, blocks of 64 along the flattened weight."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    codes, state = quantize_4bit(weight, blocksize=64, compress_statistics=False, quant_type="nf4")
    packed = codes.reshape(-1)
    indices = torch.stack([packed >> 4, packed & 15], dim=1).reshape(-1)[: weight.numel()].long()
    book = create_normal_map().float().sort().values
    scales = state.absmax.repeat_interleave(64)[: weight.numel()]
    expected = (book.unique()[indices] * scales).reshape(shape)
    found = dequantize(codes, state)
    assert found.shape == shape
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert (found - weight).abs().max() < weight.abs().max() / 4


def test_double_quantization_differs_only_by_its_scales() -> None:
    weight = torch.randn(32, 96, generator=torch.Generator().manual_seed(1))
    plain, double = (
        dequantize(*quantize_4bit(weight, blocksize=64, compress_statistics=nested, quant_type="nf4"))
        for nested in (False, True)
    )
    assert 0 < (plain - double).abs().max() < 0.1


def test_a_base_that_a_cpu_would_compute_wrongly_is_refused(
    chatml_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=len(chatml_tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    chatml_tokenizer.save_pretrained(tmp_path)
    ref = resolve_base(str(tmp_path))
    with pytest.raises(BaseModelError, match=r"1 layers have a width .* model\.layers\.0\.mlp\.down_proj \(96 wide\)"):
        load_base_model(ref, QuantizationSection(), device=torch.device("cpu"))
    load_base_model(ref, QuantizationSection(load_in_4bit=False), device=torch.device("cpu"))
