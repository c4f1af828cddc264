"""TRL's sampling with top-p or top-k: what the sampler kept is recorded, stays with its tokens, and is used."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cases import rel_rms
from tests.trl_loss import trl_missing

pytestmark = pytest.mark.skipif(trl_missing() is not None, reason=str(trl_missing()))
pytest.importorskip("datasets")

from grpo_fast.packing import Support  # noqa: E402
from tests import tiny, trl_runs  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trl")


@pytest.fixture(scope="module")
def classes() -> tuple[Any, Any]:
    from trl import GRPOTrainer

    from grpo_fast.integrations.trl import GRPOTrainer as Ours

    return GRPOTrainer, Ours


class Watched:
    """A trainer's generations, as transformers reports them itself, what was made of them, and its micro-batches."""

    def __init__(self, trainer: Any) -> None:
        self.scores: list[torch.Tensor] = []  # [B, steps, V] of each generation
        self.scored: list[dict[str, Any]] = []
        self.batches: list[dict[str, Any]] = []
        self.current: list[torch.Tensor] = []
        generate, score, loss = trainer.model.generate, trainer._generate_and_score_completions, trainer._compute_loss

        def generate_and_tell(*args: Any, **kwargs: Any) -> torch.Tensor:
            found = generate(*args, **kwargs, output_scores=True, return_dict_in_generate=True)
            self.scores.append(torch.stack(found.scores, dim=1))
            return found.sequences

        def score_and_keep(inputs: Any) -> Any:
            self.scored.append(score(inputs))
            return self.scored[-1]

        def compute_and_keep(model: Any, inputs: Any) -> Any:
            self.batches.append(inputs)
            value = loss(model, inputs)
            if getattr(trainer, "grpo_fast", None) is not None and trainer.grpo_fast.policy.last is not None:
                self.current.append(trainer.grpo_fast.policy.last.logprobs)
            return value

        trainer.model.generate = generate_and_tell
        trainer._generate_and_score_completions = score_and_keep
        trainer._compute_loss = compute_and_keep

    def sampled(self, number: int = 0) -> torch.Tensor:
        """The sampler's log-probabilities of a generation's completions `[B, C]`."""
        ids = self.scored[number]["completion_ids"]
        return self.scores[number].log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def test_the_first_ratio_is_one_where_trls_is_biased(folder: Path, classes: tuple[Any, Any]) -> None:
    """Old log-probabilities are the sampler's; TRL's are lower by the log of the mass that was kept."""
    options = {"top_p": 0.9, "num_iterations": 2, "max_steps": 1}
    runs = []
    for cls in classes:
        trainer = trl_runs.trainer_of(cls, folder, **options)
        runs.append(Watched(trainer))
        trl_runs.train(trainer)
    theirs, ours = runs
    mask = ours.scored[0]["completion_mask"].bool()
    sampled = ours.sampled()
    assert torch.equal(ours.scored[0]["completion_ids"], theirs.scored[0]["completion_ids"])
    torch.testing.assert_close(ours.scored[0]["old_per_token_logps"][mask], sampled[mask], rtol=0, atol=1e-5)
    gap = (theirs.scored[0]["old_per_token_logps"] - sampled)[mask]
    assert gap.max() < -0.005
    assert gap.mean() == pytest.approx(torch.tensor(0.9).log().item(), abs=0.05)
    first = ours.batches[0]
    mask = first["completion_mask"].bool()
    assert torch.equal(ours.current[0][mask], first["old_per_token_logps"][mask])


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_the_gradient_on_recorded_supports(folder: Path, classes: tuple[Any, Any], beta: float) -> None:
    """Against float64 logits of which all but the sampler's are -inf; with ratios that are not 1."""
    from transformers import AutoModelForCausalLM

    trainer = trl_runs.trainer_of(classes[1], folder, top_p=0.8, temperature=0.7, beta=beta, loss_type="grpo")
    watched = Watched(trainer)
    trl_runs.train(trainer)
    inputs = dict(watched.batches[0])
    gen = torch.Generator().manual_seed(4)
    path = trl_runs.saved_model(folder)
    reference = AutoModelForCausalLM.from_pretrained(path).double()
    plain = AutoModelForCausalLM.from_pretrained(path).double()
    plain.load_state_dict(trainer.model.state_dict())
    current, ref = (_masked_logprobs(model, inputs, 0.7) for model in (plain, reference))
    old = current.detach() + 0.1 * torch.randn(current.shape, generator=gen)
    inputs["old_per_token_logps"] = old.float()
    mask, advantages = inputs["completion_mask"].bool(), inputs["advantages"].double().unsqueeze(1)
    ratio = (current - inputs["old_per_token_logps"]).exp()
    terms = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    if beta:
        torch.testing.assert_close(
            inputs["ref_per_token_logps"].double()[mask], ref.detach()[mask], rtol=1e-4, atol=1e-5
        )
        drift = ref.detach() - current
        terms = terms + beta * (drift.exp() - drift - 1) * ratio  # TRL corrects the KL's bias by the ratio
    expected = ((terms * mask).sum(1) / mask.sum(1)).mean()
    expected.backward()
    trainer.model.zero_grad()
    value = trainer.compute_loss(trainer.model, inputs)
    value.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-4)
    for (name, mine), other in zip(trainer.model.named_parameters(), plain.parameters(), strict=True):
        assert rel_rms(mine.grad, other.grad) < 1e-4, name


def _masked_logprobs(model: Any, inputs: dict[str, Any], temperature: float) -> torch.Tensor:
    """`[B, C]` float64 on the supports, from whole logits."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    length = inputs["completion_ids"].shape[1]
    logits = model(input_ids=ids, attention_mask=mask).logits[:, -length - 1 : -1] / temperature
    kept = torch.ones_like(logits, dtype=torch.bool)
    for row, support in enumerate(inputs["support"]):
        for place in range(support.num_rows):
            allowed = support[place : place + 1].token_ids.long()
            if allowed.numel():
                kept[row, place] = False
                kept[row, place, allowed] = True
    scores = logits.masked_fill(~kept, -torch.inf).log_softmax(-1)
    return scores.gather(-1, inputs["completion_ids"].unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("lora", [False, True])
def test_supports_stay_with_their_tokens(folder: Path, classes: tuple[Any, Any], lora: bool) -> None:
    """Two iterations, two micro-batches a step, shuffled: each completion has what transformers kept for it."""
    trainer = trl_runs.trainer_of(
        classes[1],
        folder,
        peft=trl_runs.lora() if lora else None,
        top_k=5,
        num_iterations=2,
        gradient_accumulation_steps=2,
        max_completion_length=12,
        max_steps=4,
    )
    watched = Watched(trainer)
    trl_runs.train(trainer)
    assert len(watched.batches) == 8
    assert len(watched.scores) == 2
    for number, inputs in enumerate(watched.batches):
        scores, said = watched.scores[number // 4], watched.scored[number // 4]
        rows = {tuple(ids): row for row, ids in enumerate(said["completion_ids"].tolist())}
        assert len(inputs["support"]) == len(inputs["completion_ids"]) == 6
        for support, ids, mask in zip(
            inputs["support"], inputs["completion_ids"], inputs["completion_mask"], strict=True
        ):
            length = int(mask.sum())
            expected = scores[rows[tuple(ids.tolist())]]
            assert support.num_rows == length
            assert support.token_ids.device.type == "cpu"
            assert support.token_ids.dtype == torch.int32
            for place in range(length):
                kept = support[place : place + 1].token_ids.tolist()
                assert kept == expected[place].isfinite().nonzero()[:, 0].tolist()
                assert len(kept) == 5
                assert ids[place] in kept
    moved = dict(watched.batches[-1])
    moved["support"] = moved["support"][1:] + moved["support"][:1]
    lengths = {support.num_rows for support in moved["support"]}
    assert lengths == {12}, "the tiny model stops too early to show that the check is by content"
    with pytest.raises(ValueError, match=r"support: expected the target"):
        trainer.compute_loss(trainer.model, moved)


def test_off_is_what_it_was(
    folder: Path, classes: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Switched off, a run with top-p logs TRL's numbers; without truncation nothing is recorded and no bit differs."""
    from grpo_fast.integrations.trl import accelerate_trainer

    path = trl_runs.saved_model(folder)
    options = {"num_iterations": 2, "max_steps": 4, "model": path}

    def run(cls: Any, support: str | None = None, **more: Any) -> tuple[Any, list[dict[str, float]]]:
        trainer = trl_runs.trainer_of(cls, tmp_path, **options, **more)
        if support is not None:
            trainer = accelerate_trainer(trainer, support=support)
        return trainer, trl_runs.train(trainer)

    _, theirs = run(classes[0], top_p=0.7)
    assert not trl_runs.differences(run(classes[0], "off", top_p=0.7)[1], theirs, 1e-3)
    assert trl_runs.differences(run(classes[0], "auto", top_p=0.7)[1], theirs, 1e-3)
    whole = [run(classes[0], support) for support in ("off", "auto")]
    assert whole[0][1] == whole[1][1]
    for name, weight in trl_runs.weights_of(whole[0][0]).items():
        assert torch.equal(weight, trl_runs.weights_of(whole[1][0])[name]), name
    late = trl_runs.trainer_of(classes[1], tmp_path, top_p=0.7, **options)
    late.grpo_fast.support = "off"
    monkeypatch.setattr("grpo_fast.integrations.trl.support.Recorder.__call__", None)  # not even looked at
    assert not trl_runs.differences(trl_runs.train(late), theirs, 1e-3)
    with pytest.raises(ValueError, match="support: expected auto or off"):
        run(classes[0], "always")


def changed(turn: Any) -> Any:
    """A generation whose first completion loses a token on the way."""

    def single_turn(*args: Any, **kwargs: Any) -> Any:
        completions, *rest = turn(*args, **kwargs)
        return [completions[0][:-1], *completions[1:]], *rest

    return single_turn


def in_two_turns(turn: Any) -> Any:
    """As after a tool's answer: what is generated then comes behind what was."""

    def single_turn(*args: Any, **kwargs: Any) -> Any:
        first, second = turn(*args, **kwargs), turn(*args, **kwargs)
        return [one + two for one, two in zip(first[0], second[0], strict=True)], *first[1:]

    return single_turn


@pytest.mark.parametrize("case", ["changed", "two turns", "beams"])
def test_what_cannot_be_matched_is_left_aside(
    folder: Path, classes: tuple[Any, Any], caplog: pytest.LogCaptureFixture, case: str
) -> None:
    more = {"generation_kwargs": {"num_beams": 2}} if case == "beams" else {}
    trainer = trl_runs.trainer_of(classes[1], folder, top_k=5, max_steps=3, num_iterations=1, **more)
    turns = {"changed": changed, "two turns": in_two_turns}
    if case in turns:
        trainer._generate_single_turn = turns[case](trainer._generate_single_turn)
    seen: list[dict[str, Any]] = []
    loss = trainer._compute_loss
    trainer._compute_loss = lambda model, inputs: (seen.append(inputs), loss(model, inputs))[1]
    with caplog.at_level(logging.WARNING, logger="grpo_fast"):
        trl_runs.train(trainer)
    assert len(seen) == 3
    assert not any("support" in inputs for inputs in seen)
    assert sum("support: what the sampler kept" in record.message for record in caplog.records) == 1


def test_the_recorder_knows_what_it_saw() -> None:
    """Completions in another order, a step looked at twice (drafts) or missing: nothing."""
    from grpo_fast.integrations.trl.support import Recorder

    prompts, said = torch.tensor([[7, 8], [8, 9]]), torch.tensor([[1, 2, 3], [4, 0, 1]])

    def recorded(steps: list[int]) -> Recorder:
        recorder = Recorder()
        for step in steps:
            scores = torch.full((2, 5), -torch.inf)
            scores[:, step] = 0.0
            scores.scatter_(1, said[:, step : step + 1], 0.0)
            assert recorder(torch.cat([prompts, said[:, :step]], dim=1), scores) is scores
        return recorder

    supports = recorded([0, 1, 2]).supports([[1, 2, 3], [4]])
    assert supports is not None
    assert [support.sizes.tolist() for support in supports] == [[2, 2, 2], [2]]
    assert [support.token_ids.tolist() for support in supports] == [[0, 1, 1, 2, 2, 3], [0, 4]]
    assert recorded([0, 1, 2]).supports([[4, 0, 1], [1, 2, 3]]) is None
    assert recorded([0, 1, 1]).supports([[1, 2], [4, 0]]) is None
    assert recorded([0, 1]).supports([[1, 2, 3], [4]]) is None


def test_the_model_is_left_as_it_was() -> None:
    """Its method is the class's again, also after an error: else every later `generate` would be looked at."""
    from grpo_fast.integrations.trl.support import Supports, recorded

    class Model:
        def _get_logits_processor(self) -> list[Any]:
            return []

    model = Model()
    with recorded(model):
        assert "_get_logits_processor" in vars(model)
    assert not vars(model)
    with pytest.raises(KeyError), recorded(model):
        raise KeyError
    assert not vars(model)

    supports = Supports()
    supports.settle([[1], [2]], [[[1]], [[2]]])
    assert supports.current
    supports.clear()  # another batch begins
    assert supports.current is None


# -- a rollout function that tells ------------------------------------------------------------------------------------


def told(form: str, ids: list[int]) -> Any:
    """Each token and the three after it, the last position's support unknown; in one of the accepted forms."""
    first = 1 if form == "shifted" else 0
    rows = [[(token + k) % tiny.VOCAB_SIZE for k in range(first, first + 4)] for token in ids[:-1]] + [[]]
    if form in ("lists", "shifted"):
        return rows
    padded = torch.tensor([row or [-1] * 4 for row in rows] + [[-1] * 4] * 3)  # beyond the completion as well
    if form == "ids":
        return padded
    support = Support.from_padded(padded[: len(ids)])
    if form == "support":
        return support
    mask = torch.zeros(len(ids), tiny.VOCAB_SIZE, dtype=torch.bool)
    mask[support.rows_of_ids(), support.token_ids] = True
    return mask


def rollout(form: str | None) -> Any:
    def function(prompts: Any, trainer: Any) -> dict[str, Any]:
        gen = torch.Generator().manual_seed(trainer.state.global_step)
        lengths = torch.randint(2, 7, (len(prompts),), generator=gen).tolist()
        completions = [torch.randint(3, tiny.VOCAB_SIZE, (n,), generator=gen).tolist() for n in lengths]
        found = {
            "prompt_ids": [trainer.processing_class.encode(prompt) for prompt in prompts],
            "completion_ids": completions,
            "logprobs": [[-1.4] * n for n in lengths],
        }
        return found if form is None else found | {"support": [told(form, ids) for ids in completions]}

    return function


def unsupported(completions: list[str], **columns: Any) -> list[float]:
    assert "support" not in columns
    return trl_runs.letters(completions)


def test_a_rollout_function_tells_supports(folder: Path, classes: tuple[Any, Any]) -> None:
    def run(form: str | None, support: str = "auto") -> list[dict[str, float]]:
        options = {"num_iterations": 2, "max_steps": 4, "beta": 0.1, "reward_funcs": unsupported}
        trainer = trl_runs.trainer_of(classes[1], folder, rollout_func=rollout(form), **options)
        trainer.grpo_fast.support = support
        return trl_runs.train(trainer)

    whole, first = run(None), run("lists")
    assert run("lists", "off") == whole
    assert trl_runs.differences(first, whole, 1e-3)
    for form in ("ids", "support", "mask"):
        assert not trl_runs.differences(run(form), first, 1e-6), form
    assert first[0]["entropy"] < 0.7 * whole[0]["entropy"]
    measured = {name: value for name, value in first[0].items() if name.startswith("support/")}
    count = first[0]["completions/mean_length"]  # of each, the last was drawn from all
    assert measured.pop("support/mean") == pytest.approx((4 * (count - 1) + tiny.VOCAB_SIZE) / count)
    assert measured == {"support/median": 4, "support/max": tiny.VOCAB_SIZE, "support/singleton_fraction": 0}
    with pytest.raises(ValueError, match=r"support: expected the target"):
        run("shifted")


def test_what_a_rollout_function_may_not_tell() -> None:
    from grpo_fast.integrations.trl.support import Supports, padded, support_of

    with pytest.raises(ValueError, match=r"support: expected 3 rows, one a token of the completion; got 2"):
        support_of([[1], [2]], 3)
    with pytest.raises(ValueError, match="twice in row 0"):
        support_of([[1, 1]], 1)
    for wrong in ([[2**31 + 5]], torch.tensor([[2**31 + 5]]), [[2**32 + 5]]):
        with pytest.raises(ValueError, match=r"token_ids: expected ids in \[0, 2\^31\); got"):
            support_of(wrong, 1)
    for wrong in ([[1.5]], [[True]], torch.tensor([[1.0]])):
        with pytest.raises(ValueError, match=r"expected .* int32 or int64"):
            support_of(wrong, 1)
    for wrong in ([1], 5, [["a"]], [[2**70]]):
        with pytest.raises(ValueError, match=r"support: expected a Support, a bool mask \[n, V\], ids \[n, K\] or"):
            support_of(wrong, 1)
    assert support_of([None, [2]], 2).sizes.tolist() == [0, 1]
    assert support_of([[]], 1).token_ids.dtype == support_of([torch.tensor([3, 4])], 1).token_ids.dtype == torch.int32
    with pytest.raises(ValueError, match=r"support: expected 2 entries"):
        Supports().settle([[1], [2]], [[[1]]])
    with pytest.raises(ValueError, match=r"support: expected at most 1 rows"):
        padded([support_of([[1], [2]], 2)], 1)
    assert support_of(None, 3).sizes.tolist() == [0, 0, 0]
    assert padded([support_of([[1], []], 2), support_of([[4, 5]], 1)], 3).sizes.tolist() == [1, 0, 0, 2, 0, 0]


# -- subclasses -------------------------------------------------------------------------------------------------------


def test_under_a_loss_or_scoring_of_its_own(folder: Path, classes: tuple[Any, Any]) -> None:
    """TRL's loss on our log-probabilities is on the supports too; scoring of its own has none."""

    class OwnLoss(classes[1]):
        def _compute_loss(self, model: Any, inputs: Any) -> torch.Tensor:
            return super()._compute_loss(model, inputs)

    class OwnScoring(classes[1]):
        def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    options = {"top_p": 0.7, "num_iterations": 2, "max_steps": 4, "beta": 0.1}
    theirs, ours = (trl_runs.train(trl_runs.trainer_of(cls, folder, **options)) for cls in classes)
    trainer = trl_runs.trainer_of(OwnLoss, folder, **options)
    assert not trl_runs.differences(trl_runs.train(trainer), ours, 1e-3)
    assert trainer.grpo_fast.depth == "logprobs"
    trainer = trl_runs.trainer_of(OwnScoring, folder, **options)
    assert trainer.grpo_fast.support == "off"
    assert not trl_runs.differences(trl_runs.train(trainer), theirs, 1e-3)
    assert trl_runs.differences(ours, theirs, 1e-3)


def test_evaluation_is_on_supports(folder: Path, classes: tuple[Any, Any]) -> None:
    from datasets import Dataset

    logs = []
    for cls in classes:
        trainer = trl_runs.trainer_of(
            cls,
            folder,
            eval_dataset=Dataset.from_list([{"prompt": prompt} for prompt in trl_runs.PROMPTS[:3]]),
            top_k=4,
            per_device_eval_batch_size=3,
        )
        trainer.model.eval()
        torch.manual_seed(1)
        logs.append(trainer.evaluate())
    assert logs[1]["eval_entropy"] < torch.tensor(4.0).log().item() + 1e-6 < logs[0]["eval_entropy"]
