"""The embedded rollout engine: continuous batching over the trainer's own model, in the trainer's process.

One thread uses it. ``generate`` blocks until its requests are done; a server calls ``add_request``, ``step`` and
``abort`` instead. Weights are shared, not copied: between ``begin_update`` and ``end_update`` the trainer changes its
parameters, and whoever changes them quantises FP8 layers anew (``fp8.convert.refresh_weights``), as after every
optimiser step.
"""

import math
import time
from collections.abc import Iterable
from collections.abc import Sequence as List
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from infir2.fp8.convert import refresh_weights
from infir2.fp8.linear import Fp8Linear
from infir2.kernels.sample import sample
from infir2.model.transformer import CausalLM
from infir2.rollout.blocks import BlockAllocator
from infir2.rollout.cache_size import stored_dtype
from infir2.rollout.checksum import weights_checksum
from infir2.rollout.decoder import Decoder
from infir2.rollout.interface import Capabilities, EngineStats, PauseMode, Progress
from infir2.rollout.options import EngineOptions
from infir2.rollout.records import Completion, FinishReason, Request, RequestError, TokenEvent
from infir2.rollout.runner import Runner
from infir2.rollout.sampler import most_likely, random_key, sampling_batch
from infir2.rollout.scheduler import Chunk, Scheduler
from infir2.rollout.sequence import Sequence, State
from infir2.rollout.text import IncrementalText, decode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Engine:
    """A ``RolloutEngine`` around a ``CausalLM`` on one device.

    Without a tokenizer completions have no text, and stop strings are refused. Raises ValueError for sharded weights.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        options: EngineOptions | None = None,
        weight_version: int = 0,
    ) -> None:
        self.model, self.tokenizer, self.options = model, tokenizer, options or EngineOptions()
        options = self.options
        positions = model.config.max_position_embeddings
        self.max_length = min(options.max_length or positions, positions)
        blocks = BlockAllocator(options.cache_tokens // options.block_size, options.block_size)
        self._scheduler = Scheduler(blocks, options.max_sequences, options.max_batch_tokens, options.prefix_cache)
        cache_dtype = stored_dtype(options.cache_dtype, model.model.compute_dtype)
        self._runner = Runner(model, blocks.num_blocks, options.block_size, cache_dtype)
        rounds = options.decode_rounds or (16 if self._runner.device.type == "cuda" else 1)
        self._decoder = Decoder(self._runner, rounds, options.max_sequences, self.max_length)
        self._unfinished: dict[str, list[Sequence]] = {}
        self._texts: dict[Sequence, IncrementalText] = {}
        self._version = weight_version
        self._next_version: int | None = None
        self._paused = False
        self._collected: list[Completion] | None = None  # by generate, while it runs
        self._arrivals = self._requests = 0
        self._steps = self._computed = self._generated = 0
        self._seconds = 0.0

    # ---- requests

    def add_request(self, request: Request, request_id: str | None = None) -> str:
        """Queue a request, also while paused or asleep; returns its id.

        Raises RequestError for a request that can never be served, or an id that is in use.
        """
        request_id = f"request-{self._requests}" if request_id is None else request_id
        self._check(request, request_id)
        params = request.params
        seed = random_key(self.options.seed, self._requests) if params.seed is None else params.seed
        ends = () if params.ignore_eos else self.model.config.eos_token_ids
        sequences = []
        for index in range(params.n):
            sequence = Sequence(
                request_id=request_id,
                index=index,
                arrival=self._arrivals,
                tokens=list(request.prompt_ids),
                params=params,
                stop_ids=frozenset((*params.stop_token_ids, *ends)),
                key=random_key(seed, index),
            )
            self._arrivals += 1
            self._scheduler.add(sequence)
            sequences.append(sequence)
            if params.stop:
                self._texts[sequence] = IncrementalText(self.tokenizer, params.skip_special_tokens)
        self._requests += 1
        self._unfinished[request_id] = sequences
        return request_id

    def abort(self, request_id: str) -> list[Completion]:
        """End what is unfinished of a request and free its blocks; what it had is returned. Unknown ids: nothing."""
        return [self._finish(sequence, "abort") for sequence in list(self._unfinished.get(request_id, ()))]

    def abort_running(self) -> frozenset[str]:
        """After a step that failed: end the requests that run, and free their blocks. Those that only wait go on, and
        their ids are returned; but where none runs, all are ended, since any of them may be what failed."""
        running = {sequence.request_id for sequence in self._scheduler.running} or set(self._unfinished)
        for request_id in running:
            self.abort(request_id)
        return frozenset(self._unfinished)

    @property
    def has_unfinished(self) -> bool:
        return bool(self._unfinished)

    @torch.no_grad()
    def step(self) -> list[TokenEvent]:
        """One forward pass, or several where all sequences decode; the tokens they made, unless ``generate`` runs.

        Nothing while paused or when no request is unfinished.

        Raises RuntimeError while asleep or within an update, and FloatingPointError where the model's logits are not
        finite; no token of that step is kept.
        """
        if self._paused:
            return []
        self._require_usable()
        began = time.perf_counter()
        events = []
        if chunks := self._scheduler.schedule():
            rounds = self._rounds(chunks)
            events = self._decode(chunks, rounds) if rounds > 1 else self._compute(chunks)
            self._steps += rounds
        self._seconds += time.perf_counter() - began
        return events

    def generate(self, requests: List[Request], progress: Progress | None = None) -> list[list[Completion]]:
        """The n samples of each request, in order. ``progress(finished, total)`` is called after every step; it may
        abort requests, whose samples then are what they were.

        Raises RequestError before anything starts if a request cannot be served; RuntimeError if the engine has other
        requests, cannot run, or is left paused by ``progress``. Whatever is raised, none of the requests stays behind.
        """
        if self._unfinished:
            raise RuntimeError("generate needs the engine for itself, but requests are unfinished")
        self._require_usable()
        total = sum(request.params.n for request in requests)
        ids: list[str] = []
        collected: list[Completion] = []
        self._collected = collected
        try:
            for request in requests:
                ids.append(self.add_request(request))
            while len(collected) < total:
                if self._paused:
                    raise RuntimeError("the engine is paused: resume it before generate can go on")
                self.step()
                if progress is not None:
                    progress(len(collected), total)
        finally:
            for request_id in ids:
                self.abort(request_id)
            self._collected = None
        samples: dict[str, list[Completion]] = {request_id: [] for request_id in ids}
        for completion in sorted(collected, key=lambda completion: completion.index):
            samples[completion.request_id].append(completion)
        return list(samples.values())

    # ---- control

    @property
    def capabilities(self) -> Capabilities:
        recipes = {module.recipe.x for module in self.model.modules() if isinstance(module, Fp8Linear)}
        return Capabilities(
            fp8_weights=bool(recipes),
            fp8_cache=self.options.cache_dtype == "fp8",
            shared_weights=True,
            in_flight_update=True,
            logprobs="sampled",
            batch_invariant="tensor" not in recipes,  # one activation scale for the whole batch
            cuda_graphs=self._runner.device.type == "cuda" and self._decoder.most_rounds > 1,
            tensor_parallel=1,
        )

    @property
    def weight_version(self) -> int:
        """Version of the weights that the next token is made with."""
        return self._version

    def pause(self, mode: PauseMode = "keep") -> list[Completion]:
        """``step`` does nothing until ``resume``. See ``RolloutEngine.pause``; ``abort`` also ends what is queued."""
        self._paused = True
        if mode == "recompute":
            self._scheduler.retract()
        if mode == "abort":
            return [completion for request_id in list(self._unfinished) for completion in self.abort(request_id)]
        return []

    def resume(self) -> None:
        self._paused = False

    def flush_cache(self) -> None:
        """Forget every cached prefix. Running samples keep their own keys and values, but no longer share them."""
        self._scheduler.blocks.flush()

    def begin_update(self, version: int) -> None:
        """Until ``end_update`` the weights may change and no step is possible. Versions must rise (ValueError)."""
        if self._next_version is not None:
            raise RuntimeError("the update before has not ended")
        if version <= self._version:
            raise ValueError(f"weight version {version} does not follow {self._version}")
        self._next_version = version
        self.model.drop_casts()
        self._decoder.forget()

    @torch.no_grad()
    def update(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Copy weights into the model's parameters; not needed where the trainer has changed them itself.

        Raises ValueError for an unknown name or another shape; tensors before it have been copied by then.
        """
        if self._next_version is None:
            raise RuntimeError("update without begin_update")
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        for name, tensor in tensors:
            target = parameters.get(name)
            if target is None or target.shape != tensor.shape:
                shape = "no parameter of that name" if target is None else f"shape {list(target.shape)}"
                raise ValueError(f"{name} {list(tensor.shape)}: the model has {shape}")
            target.copy_(tensor)
        refresh_weights(self.model)

    def end_update(self) -> None:
        """Tokens carry the new version now. Running samples go on with the keys and values they have, as mixed samples
        whose ``versions`` say so, unless the engine was paused with ``recompute``."""
        if self._next_version is None:
            raise RuntimeError("end_update without begin_update")
        self._version, self._next_version = self._next_version, None
        if self._runner.caches:
            self.model.cast_weights()
        self.flush_cache()

    def sleep(self) -> None:
        """Free the cache. Requests stay; what was running is computed anew after ``wake``."""
        self._scheduler.retract()
        self.flush_cache()
        self._decoder.forget()
        self._runner.free_cache()

    def wake(self) -> None:
        self._runner.make_cache()

    def checksum(self) -> str:
        """Equal for bit-equal parameters and FP8 codes. Takes a pass over all weights."""
        return weights_checksum(self.model)

    def stats(self) -> EngineStats:
        blocks = self._scheduler.blocks
        return EngineStats(
            steps=self._steps,
            seconds=self._seconds,
            computed_tokens=self._computed,
            generated_tokens=self._generated,
            cached_tokens=self._scheduler.cached_tokens,
            preemptions=self._scheduler.preemptions,
            waiting=len(self._scheduler.waiting),
            running=len(self._scheduler.running),
            blocks_held=blocks.held,
            num_blocks=blocks.num_blocks,
            cache_bytes=self._runner.cache_bytes,
        )

    # ---- inside

    def _require_usable(self) -> None:
        if not self._runner.caches:
            raise RuntimeError("the engine is asleep: wake it first")
        if self._next_version is not None:
            raise RuntimeError("the weights are being updated: end the update first")

    def _require_finite(self, logprobs: Iterable[float]) -> None:
        """To be asked for all sequences before any of them is changed."""
        if not all(map(math.isfinite, logprobs)):
            raise FloatingPointError(f"the model's logits are not finite (weight version {self._version})")

    def _check(self, request: Request, request_id: str) -> None:
        prompt, params, vocabulary = request.prompt_ids, request.params, self.model.config.vocab_size
        longest = len(prompt) + params.max_new_tokens
        if request_id in self._unfinished:
            raise RequestError(f"{request_id}: a request with this id is unfinished")
        if not prompt:
            raise RequestError("the prompt has no tokens")
        if not 0 <= min(prompt) <= max(prompt) < vocabulary:
            raise RequestError(f"the prompt has token ids outside 0 to {vocabulary - 1}")
        if longest > self.max_length:
            raise RequestError(
                f"{len(prompt)} prompt tokens and max_new_tokens {params.max_new_tokens} exceed the {self.max_length} "
                "tokens that the model or the engine's max_length allows"
            )
        if not self._scheduler.fits(longest):
            raise RequestError(
                f"{len(prompt)} prompt tokens and max_new_tokens {params.max_new_tokens} do not fit into the engine's "
                f"cache of {self.options.cache_tokens} tokens; raise cache_tokens"
            )
        if params.stop and self.tokenizer is None:
            raise RequestError("stop: stop strings need an engine with a tokenizer; use stop_token_ids")

    def _compute(self, chunks: list[Chunk]) -> list[TokenEvent]:
        logits = self._runner.run(chunks)
        sampling = [chunk.sequence for chunk in chunks if chunk.samples]
        columns: list[list] = [[], [], [], []]
        if sampling:
            batch = sampling_batch(
                [sequence.params for sequence in sampling],
                [sequence.key for sequence in sampling],
                [sequence.num_generated for sequence in sampling],
                logits.device,
            )
            sampled = sample(logits, batch)
            top = most_likely(logits, [sequence.params.top_logprobs for sequence in sampling])
            columns = [sampled.tokens.tolist(), sampled.logprobs.tolist(), sampled.raw_logprobs.tolist(), top]
            self._require_finite(chain(columns[1], columns[2]))
        self._scheduler.advance(chunks)
        self._computed += sum(chunk.length for chunk in chunks)
        events = []
        for sequence, token, logprob, raw, likely in zip(sampling, *columns):
            reason = self._extend(sequence, [token], [logprob], [raw])
            events += self._emit(sequence, 1, reason, likely)
        return events

    def _rounds(self, chunks: list[Chunk]) -> int:
        """How many tokens every sequence can make before the host has to look; more than 1 only while all decode."""
        most = self._decoder.most_rounds
        if any(chunk.length > 1 or not chunk.samples or chunk.sequence.params.top_logprobs for chunk in chunks):
            return 1
        left = max(chunk.sequence.params.max_new_tokens - chunk.sequence.num_generated for chunk in chunks)
        return self._scheduler.reserve(min(most, left)) if most > 1 else 1

    def _decode(self, chunks: list[Chunk], rounds: int) -> list[TokenEvent]:
        sequences = [chunk.sequence for chunk in chunks]
        made = self._decoder.run(sequences, rounds)
        self._require_finite(chain.from_iterable(chain(made.logprobs, made.raw_logprobs)))
        self._computed += rounds * len(sequences)
        events = []
        for chunk, tokens, logprobs, raw in zip(chunks, made.tokens, made.logprobs, made.raw_logprobs):
            sequence, before = chunk.sequence, chunk.sequence.num_generated
            reason = self._extend(sequence, tokens, logprobs, raw)
            count = sequence.num_generated - before
            self._scheduler.advance([Chunk(sequence, chunk.start, count, True)])
            events += self._emit(sequence, count, reason, ())
        return events

    def _extend(
        self, sequence: Sequence, tokens: list[int], logprobs: list[float], raw: list[float]
    ) -> FinishReason | None:
        """Append sampled tokens up to the one that ends the sequence, if one does; why it ends."""
        reason: FinishReason | None = None
        left = sequence.params.max_new_tokens - sequence.num_generated
        if len(tokens) >= left:
            tokens, reason = tokens[:left], "length"
        if sequence in self._texts or not sequence.stop_ids.isdisjoint(tokens):
            for count, token in enumerate(tokens, 1):
                if token in sequence.stop_ids or self._stop_string_in(sequence, token):
                    tokens, reason = tokens[:count], "stop"
                    break
        count = len(tokens)
        sequence.tokens += tokens
        sequence.logprobs += logprobs[:count]
        sequence.raw_logprobs += raw[:count]
        sequence.versions += [self._version] * count
        self._generated += count
        return reason

    def _emit(
        self, sequence: Sequence, count: int, reason: FinishReason | None, top: tuple[tuple[int, float], ...]
    ) -> list[TokenEvent]:
        """Finish the sequence where there is a reason to; events of its last ``count`` tokens, if somebody listens."""
        completion = None if reason is None else self._finish(sequence, reason)
        if self._collected is not None:
            return []
        rows = zip(sequence.tokens[-count:], sequence.logprobs[-count:], sequence.raw_logprobs[-count:])
        events = [TokenEvent(sequence.request_id, sequence.index, *row, top, None) for row in rows]
        return [*events[:-1], replace(events[-1], completion=completion)]

    def _stop_string_in(self, sequence: Sequence, token: int) -> bool:
        """Whether the token completes a stop string. Only where it can begin is looked at again."""
        text = self._texts.get(sequence)
        if text is None:
            return False
        longest = max(map(len, sequence.params.stop))
        piece = text.push(token)
        tail = text.text[-(len(piece) + longest) :]
        return bool(piece) and any(stop in tail for stop in sequence.params.stop)

    def _finish(self, sequence: Sequence, reason: FinishReason) -> Completion:
        assert sequence.state is not State.FINISHED
        self._scheduler.finish(sequence, reason)
        rest = self._unfinished[sequence.request_id]
        rest.remove(sequence)
        if not rest:
            del self._unfinished[sequence.request_id]
        completion = Completion(
            request_id=sequence.request_id,
            index=sequence.index,
            token_ids=tuple(sequence.generated),
            logprobs=tuple(sequence.logprobs),
            versions=tuple(sequence.versions),
            finish_reason=reason,
            prompt_tokens=sequence.prompt_length,
            cached_tokens=min(sequence.cached_tokens or 0, sequence.prompt_length),
            raw_logprobs=tuple(sequence.raw_logprobs) if sequence.params.raw_logprobs else None,
            text=self._text(sequence),
        )
        if self._collected is not None:
            self._collected.append(completion)
        return completion

    def _text(self, sequence: Sequence) -> str | None:
        self._texts.pop(sequence, None)
        if self.tokenizer is None:
            return None
        tokens = sequence.generated
        if tokens and tokens[-1] in sequence.stop_ids:
            tokens = tokens[:-1]
        text = decode(self.tokenizer, tokens, sequence.params.skip_special_tokens)
        found = [place for stop in sequence.params.stop if (place := text.find(stop)) >= 0]
        return text[: min(found)] if found else text
