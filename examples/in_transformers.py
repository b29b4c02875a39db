"""A mixture-of-experts model of Hugging Face's transformers, with ffmoe in the place of its MoE blocks.

The same weights, without a copy of them, the same answers, and less time for a step. A Qwen3-MoE with random weights,
or with --model one that `from_pretrained` can load:

    python examples/in_transformers.py [--device cuda] [--model FOLDER_OR_NAME]
"""

import argparse
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ffmoe_torch import MoELayer

try:
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock
except ImportError as error:
    sys.exit(f"in_transformers.py needs transformers 5 ({error}): pip install 'transformers>=5'")

SIZES = {
    "cpu": {"hidden_size": 256, "moe_intermediate_size": 128, "num_experts": 32, "num_hidden_layers": 4},
    "cuda": {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128, "num_hidden_layers": 4},
}
TOKENS = {"cpu": (2, 256), "cuda": (4, 2048)}
ROUNDS = 5


class Block(nn.Module):
    """In the place of a Qwen3MoeSparseMoeBlock: [batch, length, H] -> the same."""

    def __init__(self, block: Qwen3MoeSparseMoeBlock) -> None:
        super().__init__()
        router, experts = block.gate, block.experts
        # made without memory, for the block's own weights to be put into
        self.moe = MoELayer(
            experts.hidden_dim,
            2 * experts.intermediate_dim,
            experts.num_experts,
            router.top_k,
            norm_topk_prob=router.norm_topk_prob,
            device="meta",
            dtype=experts.down_proj.dtype,
        )
        self.moe.load_state_dict(
            {"gate.weight": router.weight, "w_up": experts.gate_up_proj, "w_down": experts.down_proj},
            assign=True,
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        output, _ = self.moe(hidden_states)
        return output


def replace_blocks(model: nn.Module) -> int:
    """Puts a Block in the place of each of the model's MoE blocks; how many there were."""
    found = [name for name, module in model.named_modules() if isinstance(module, Qwen3MoeSparseMoeBlock)]
    for name in found:
        model.set_submodule(name, Block(model.get_submodule(name)))
    return len(found)


def seconds(step: Callable[[], object], device: torch.device) -> float:
    """The fastest of a few rounds, after one that compiles what there is to compile."""
    times = []
    for _ in range(1 + ROUNDS):
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", choices=TOKENS, default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda"
    )
    parser.add_argument("--model", help="a folder or name of a Qwen3-MoE, instead of random weights")
    args = parser.parse_args()
    device, dtype = torch.device(args.device), torch.bfloat16 if args.device == "cuda" else torch.float32

    torch.manual_seed(0)
    if args.model:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
    else:
        config = Qwen3MoeConfig(
            **SIZES[args.device],
            num_experts_per_tok=8,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=64,
            vocab_size=4096,
        )
        model = Qwen3MoeForCausalLM(config).to(dtype)
        for name, parameter in model.named_parameters():
            if name.endswith("gate.weight"):  # zeros until it is trained: no token would prefer an expert
                nn.init.normal_(parameter, std=config.hidden_size**-0.5)
    model = model.to(device).eval()
    tokens = torch.randint(model.config.vocab_size, TOKENS[args.device], device=device)

    def step() -> Tensor:
        model.zero_grad()
        output = model(input_ids=tokens, labels=tokens, use_cache=False)
        output.loss.backward()
        return output.logits.detach()

    before, took_before = step(), seconds(step, device)
    count = replace_blocks(model)
    after, took_after = step(), seconds(step, device)
    distance = torch.linalg.vector_norm(after - before) / torch.linalg.vector_norm(before)
    print(f"{count} blocks replaced; the logits differ by {distance:.1e} of their norm")
    print(f"forward and backward: {took_before * 1e3:.1f} ms before, {took_after * 1e3:.1f} ms with ffmoe")
    return 0


if __name__ == "__main__":
    sys.exit(main())
