"""TRL's GRPOTrainer on the work of `peer_work`, in the settings that were fastest for it; run by `peers` in its own venv."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# A script of another environment, where nothing of this repository is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.bench import peer_work


def build_tokenizer(work: peer_work.Work) -> Any:
    """Character tokenizer whose end-of-sequence id lies beyond the model's vocabulary, so no response ends early."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<unk>": 1} | {character: 2 + i for i, character in enumerate(peer_work.ALPHABET)}
    vocabulary |= {f"<{i}>": i for i in range(len(vocabulary), work.vocab_size)} | {"<eos>": work.vocab_size}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>", padding_side="left"
    )


def main() -> None:
    arguments = peer_work.parser(__doc__ or "").parse_args()
    os.environ.update(OMP_NUM_THREADS=str(arguments.threads), HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    import datasets
    import torch
    import transformers
    import trl

    torch.set_num_threads(arguments.threads)
    work = peer_work.work_of(arguments)
    transformers.set_seed(work.seed)
    model = transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            vocab_size=work.vocab_size,
            hidden_size=work.hidden_size,
            num_hidden_layers=work.num_layers,
            num_attention_heads=work.heads,
            num_key_value_heads=work.kv_heads,
            head_dim=work.head_dim,
            num_experts=work.num_experts,
            num_experts_per_tok=work.top_k,
            moe_intermediate_size=work.expert_width,
            intermediate_size=work.expert_width * work.top_k,
            norm_topk_prob=True,
            decoder_sparse_step=1,
            max_position_embeddings=max(64, work.longest),
            tie_word_embeddings=False,
            experts_implementation="grouped_mm",
            attn_implementation="eager",
            bos_token_id=None,
            eos_token_id=work.vocab_size,
            pad_token_id=0,
        )
    )
    steps = arguments.warmup + arguments.steps
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    marks: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            marks.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            marks.append(time.perf_counter())

    lengths: set[int] = set()

    def rewards(completion_ids: list[list[int]], **_: Any) -> list[float]:
        lengths.update(map(len, completion_ids))
        return [peer_work.reward(ids) for ids in completion_ids]

    with tempfile.TemporaryDirectory() as folder:
        config = trl.GRPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=work.prompts * work.group_size // processes,
            ddp_find_unused_parameters=False,
            gradient_accumulation_steps=1,
            num_generations=work.group_size,
            max_completion_length=work.new_tokens,
            max_steps=steps,
            learning_rate=work.lr,
            temperature=1.0,
            beta=0.0,
            router_aux_loss_coef=0.0,
            gradient_checkpointing=False,
            disable_dropout=True,
            logging_steps=10 * steps,
            save_strategy="no",
            eval_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_num_workers=0,
            dataloader_pin_memory=False,
            seed=work.seed,
        )
        prompts = datasets.Dataset.from_dict({"prompt": work.prompt_texts(work.prompts * steps)})
        trainer = trl.GRPOTrainer(
            model=model,
            reward_funcs=rewards,
            args=config,
            train_dataset=prompts,
            processing_class=build_tokenizer(work),
            callbacks=[Clock()],
        )
        trainer.train()
    if processes > 1:
        torch.distributed.destroy_process_group()  # else one process may abort the other at exit
    if lengths != {work.new_tokens}:
        raise RuntimeError(f"responses of {sorted(lengths)} tokens; every one should have {work.new_tokens}")
    if int(os.environ.get("RANK", "0")) > 0:
        return
    parameters = sum(p.numel() for p in model.parameters())
    peer_work.write_result(
        arguments.out,
        name="TRL",
        version=trl.__version__,
        marks=marks,
        warmup=arguments.warmup,
        parameters=parameters,
    )


if __name__ == "__main__":
    main()
