"""One process of `m1 bench train`: `python -m m1.training.bench_worker TASK.json`, told what to do on its stdin.

A line {"do": "steps", "steps": n} runs n training steps, "parts" runs them with a clock on every part, "export" writes
the weights for the other side; the answer is one JSON line on stdout. The end of stdin ends the process.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

from m1.config.model import Model
from m1.config.parallel import Parallel
from m1.config.training import Optimizer
from m1.training.bench import Task, Way

LEARNING_RATE = 1e-4


class Clock:
    """Time by part; the innermost part that is open counts, so the parts add up to the whole."""

    def __init__(self, outermost: str) -> None:
        self.seconds: dict[str, float] = {}
        self.open = [outermost]
        self.last = time.perf_counter()

    def _note(self) -> None:
        now = time.perf_counter()
        self.seconds[self.open[-1]] = self.seconds.get(self.open[-1], 0.0) + now - self.last
        self.last = now

    def start(self, part: str) -> None:
        self._note()
        self.open.append(part)

    def stop(self, part: str) -> None:
        """Close `part` and what was opened inside it; nothing, if it is not open."""
        self._note()
        if part in self.open[1:]:
            while self.open.pop() != part:
                pass

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        self.start(name)
        try:
            yield
        finally:
            self.stop(name)

    def watch(self, module: nn.Module, part: str) -> list[Any]:
        """Count forward and backward pass of a module as `part`; returns the hooks' handles.

        The backward pass of a module begins with the gradient of its output and ends when that of its input is whole;
        without an input that has a gradient (the embedding) only the forward pass is counted.
        """
        ends = [False]

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.requires_grad), None)
            ends[0] = given is not None and given.grad_fn is not None
            if given is not None and given.grad_fn is not None:
                given.register_hook(lambda grad: self.stop(part))
            self.start(part)

        def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.stop(part)
            result = output[0] if isinstance(output, tuple) else output
            if ends[0] and isinstance(result, Tensor) and result.requires_grad:
                result.register_hook(lambda grad: self.start(part))

        return [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]

    def wrap(self, owner: Any, name: str, part: str) -> Callable[[], None]:
        """Count calls of `owner.name` as `part`; returns what undoes it."""
        original = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(part):
                return original(*args, **kwargs)

        setattr(owner, name, timed)
        return lambda: setattr(owner, name, original)


class Ours:
    """This project's trainer, one data-parallel rank of it."""

    def __init__(self, task: Task, way: Way) -> None:
        from m1.training import parallel
        from m1.training.trainer import Trainer

        layout = Parallel(world_size=way.ranks, threads_per_rank=way.threads, precision=task.precision)
        parallel.initialize(layout, task.seed)
        self.settings = Model(**task.model)
        self.trainer = Trainer(self.settings, layout, seed=task.seed, optimizer=Optimizer(**task.optimizer))

    def step(self, tokens: Tensor) -> float:
        from m1.training.batch import full_batch
        from m1.training.trainer import language_model_loss

        return self.trainer.step([full_batch(tokens)], language_model_loss, LEARNING_RATE)["loss"]

    def export(self, folder: Path) -> None:
        """The present weights and their configuration, as transformers reads them."""
        from safetensors.torch import save_file

        from m1.formats.convert import to_transformers, transformers_config

        model = self.trainer.model
        folder.mkdir(parents=True, exist_ok=True)
        transformers_config(self.settings, model.rotary_base).save_pretrained(folder)
        weights = to_transformers(dict(model.named_parameters()), self.settings)
        save_file({name: w.float().contiguous() for name, w in weights.items()}, folder / "model.safetensors")

    def watch(self, clock: Clock) -> Callable[[], None]:
        trainer, model = self.trainer, self.trainer.model
        handles: list[Any] = []
        for layer in model.decoder.layers:
            softmax = self.settings.is_softmax_layer(layer.layer_number - 1)
            attention = "softmax attention" if softmax else "lightning attention"
            handles += clock.watch(layer.self_attention, attention)
            handles += clock.watch(layer.mlp, "MoE dispatch")
            handles += clock.watch(layer.mlp.router, "MoE router")
            handles += clock.watch(layer.mlp.experts, "MoE experts")
            for norm in (layer.input_layernorm, layer.pre_mlp_layernorm):
                handles += clock.watch(norm, "norms")
        handles += clock.watch(model.decoder.final_layernorm, "norms")
        handles += clock.watch(model.output_layer, "head")
        handles += clock.watch(model.embedding, "embedding")
        undo = [
            *(clock.wrap(ddp, "zero_grad_buffer", "Megatron: gradient buffers") for ddp in trainer.ddps),
            clock.wrap(trainer.config, "finalize_model_grads_func", "communication: gradients"),
            clock.wrap(trainer.optimizer, "prepare_grads", "Megatron: gradient buffers"),
            clock.wrap(trainer.optimizer, "get_grad_norm", "gradient norm"),
            clock.wrap(trainer, "_update", "optimizer"),
        ]

        def stop() -> None:
            for handle in handles:
                handle.remove()
            for back in undo:
                back()

        return stop


class Transformers:
    """A plain loop around transformers' `MiniMaxForCausalLM`."""

    def __init__(self, task: Task, way: Way) -> None:
        from safetensors.torch import load_file
        from transformers import MiniMaxConfig, MiniMaxForCausalLM
        from transformers.utils import logging

        logging.set_verbosity_error()
        torch.set_num_threads(way.threads)
        if way.ranks > 1:
            torch.distributed.init_process_group("gloo")
        self.autocast = way.autocast
        config = MiniMaxConfig.from_pretrained(task.weights)
        config._attn_implementation = "sdpa"
        config._experts_implementation = way.experts
        model = MiniMaxForCausalLM(config).float()
        missing, unexpected = model.load_state_dict(load_file(Path(task.weights) / "model.safetensors"), strict=False)
        tables = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")
        if unexpected or any(not name.endswith(tables) for name in missing):
            raise SystemExit(f"the weights do not fit transformers' model: {[*missing, *unexpected][:3]}")
        self.model = model.train()
        self.module: nn.Module = nn.parallel.DistributedDataParallel(model) if way.ranks > 1 else model
        settings = Optimizer(**task.optimizer)
        self.clip = settings.clip_grad
        matrices = [p for p in model.parameters() if p.dim() > 1]
        vectors = [p for p in model.parameters() if p.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        betas = (settings.beta1, settings.beta2)
        self.optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=betas, eps=settings.eps, fused=True)
        self.clock: Clock | None = None

    def step(self, tokens: Tensor) -> float:
        part: Callable[..., Any] = self.clock.part if self.clock else contextlib.nullcontext
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            with part("forward"):
                logits = self.module(input_ids=tokens[:, :-1], use_cache=False).logits
            with part("loss"):
                loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        with part("backward"):
            loss.backward()
        with part("gradient norm"):
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        with part("optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def watch(self, clock: Clock) -> Callable[[], None]:
        self.clock = clock

        def stop() -> None:
            self.clock = None

        return stop


def draw(task: Task, way: Way, rank: int, step: int) -> Tensor:
    """This rank's sequences of a step, int64 (batch / ranks, sequence + 1); the same batch for every way to run."""
    generator = torch.Generator().manual_seed(task.seed * 1_000_003 + step)
    vocabulary = task.model["vocab_size"]
    whole = torch.randint(0, vocabulary, (task.batch_size, task.sequence_length + 1), generator=generator)
    return whole.chunk(way.ranks)[rank].contiguous()


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing that a library prints may come between the answers
    task = Task(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    way, rank = Way(**task.way), int(os.environ["RANK"])
    os.sched_setaffinity(0, task.cores)
    runner: Any = Ours(task, way) if task.side == "ours" else Transformers(task, way)
    done = 0

    def steps(count: int, clock: Clock | None = None) -> float:
        nonlocal done
        loss = 0.0
        for _ in range(count):
            with clock.part("data") if clock else contextlib.nullcontext():
                tokens = draw(task, way, rank, done)
            loss = runner.step(tokens)
            done += 1
        return loss

    for line in sys.stdin:
        order = json.loads(line)
        answer: dict[str, Any] = {}
        if order["do"] == "export":
            if rank == 0:
                runner.export(Path(task.weights))
        elif order["do"] == "steps":
            start = time.perf_counter()
            answer["loss"] = mean_loss(steps(order["steps"]), task, way)
            answer["seconds"] = time.perf_counter() - start
        else:
            clock = Clock("residuals, loss, schedule" if task.side == "ours" else "between")
            stop = runner.watch(clock)
            steps(order["steps"], clock)
            clock.stop("")
            stop()
            answer["parts"] = {name: spent / order["steps"] for name, spent in clock.seconds.items()}
        print(json.dumps(answer), file=answers, flush=True)


def mean_loss(loss: float, task: Task, way: Way) -> float:
    """The loss of the whole batch: ours is that already, the peer's is of its rank's half."""
    if task.side == "ours" or way.ranks == 1:
        return loss
    value = torch.tensor([loss / way.ranks], dtype=torch.float64)
    torch.distributed.all_reduce(value)
    return float(value)


if __name__ == "__main__":
    main()
