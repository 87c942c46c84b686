"""Asks all checkers about a content, and says whether it may pass."""

import asyncio
import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from krea2_server.moderation.checkers import Checker, CheckerError
from krea2_server.moderation.messages import ModelSpec
from krea2_server.moderation.model_process import ModelLoadError, ModelProcess
from krea2_server.moderation.openai_moderations import ApiKeyError, OpenAIModerations
from krea2_server.moderation.policy import (
    AddressPolicy,
    ModelPolicy,
    ModerationConfigError,
    Policy,
    Stage,
    field_error,
    load_policy,
)

__all__ = ["ModerationConfigError", "ModerationUnavailableError", "Moderator", "Verdict"]

logger = logging.getLogger(__name__)

_STAGES: tuple[Stage, ...] = ("prompt", "image")
_OUTCOMES = ("allowed", "refused", "error")


class ModerationUnavailableError(Exception):
    """A checker could not answer, and the policy lets nothing pass unchecked."""


@dataclass(frozen=True)
class Verdict:
    """On some contents together.

    Attributes:
        allowed: whether they may pass.
        categories: that were over their thresholds, sorted.
        checker: which has refused them.
    """

    allowed: bool
    categories: tuple[str, ...] = ()
    checker: str = ""


class ModelChecker:
    """A `Checker` that asks the process of the models.

    Args:
        policy: of the model.
        process: has it.
        index: its place there.
    """

    def __init__(self, policy: ModelPolicy, process: ModelProcess, index: int) -> None:
        self.policy = policy
        self._process = process
        self._index = index

    async def scores(self, stage: Stage, contents: Sequence[Any]) -> Mapping[str, float]:
        return await self._process.scores(self._index, contents)


class Moderator:
    """Follows a policy.

    Args:
        policy: what to check, and how strictly.
        file: that it comes from, for messages.

    Attributes:
        counts: checks by stage (prompt, image) and outcome (allowed, refused, error). An error is
            a check that nobody refused and somebody could not do, whatever ``on_error`` made of it.
    """

    def __init__(self, policy: Policy, file: Path) -> None:
        self.counts = dict.fromkeys(itertools.product(_STAGES, _OUTCOMES), 0)
        self._policy = policy
        self._file = file
        self._models: dict[int, ModelPolicy] = {}
        self._addresses: dict[int, OpenAIModerations] = {}
        for index, checker in enumerate(policy.checkers):
            if isinstance(checker, AddressPolicy):
                self._addresses[index] = OpenAIModerations(checker)
            else:
                self._models[index] = checker
        self._process = ModelProcess(
            [ModelSpec(model.type, model.model, model.device) for model in self._models.values()]
        )
        self._checkers: list[Checker] = [
            *self._addresses.values(),
            *(
                ModelChecker(model, self._process, place)
                for place, model in enumerate(self._models.values())
            ),
        ]

    @classmethod
    def from_file(cls, path: Path) -> "Moderator":
        """One that follows the policy in a YAML file.

        Raises:
            ModerationConfigError: it cannot be read, or something in it is wrong.
        """
        return cls(load_policy(path), path)

    async def start(self) -> None:
        """Load the models.

        Raises:
            ModerationConfigError: the policy cannot be followed.
        """
        try:
            for index, address in self._addresses.items():
                try:
                    address.start()
                except ApiKeyError as error:
                    raise self._error(index, "api_key_env", str(error)) from None
            if self._models:
                await self._load_models()
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """End the process of the models, and all connections."""
        await asyncio.gather(
            self._process.close(), *(address.close() for address in self._addresses.values())
        )

    async def check_prompts(self, prompts: Sequence[str], low: bool = False) -> Verdict:
        """Whether some prompts may be generated from; one that may not is enough to refuse all.

        Args:
            low: whether the policy's ``low`` applies.

        Raises:
            ModerationUnavailableError: nobody can say.
        """
        # No tokenizer and no JSON takes half a surrogate pair.
        texts = [prompt.encode(errors="replace").decode() for prompt in prompts]
        return await self._check("prompt", [text for text in texts if text.strip()], low)

    async def check_images(self, images: Sequence[bytes], low: bool = False) -> Verdict:
        """Whether some images, as PNG, JPEG or WebP, may be shown; see `check_prompts`."""
        return await self._check("image", images, low)

    async def _check(self, stage: Stage, contents: Sequence[Any], low: bool) -> Verdict:
        checkers = [
            checker
            for checker in self._checkers
            if stage in checker.policy.checks and checker.policy.thresholds(low)
        ]
        if not contents or not checkers:
            return Verdict(True)
        tasks = [
            asyncio.create_task(self._ask(checker, stage, contents, low)) for checker in checkers
        ]
        failure: CheckerError | None = None
        try:
            for next_done in asyncio.as_completed(tasks):
                try:
                    verdict = await next_done
                except CheckerError as error:
                    # Another may still refuse, which says more.
                    failure = error
                    continue
                if not verdict.allowed:
                    self.counts[stage, "refused"] += 1
                    return verdict
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if failure is None:
            self.counts[stage, "allowed"] += 1
            return Verdict(True)
        self.counts[stage, "error"] += 1
        if self._policy.on_error == "refuse":
            raise ModerationUnavailableError(str(failure))
        return Verdict(True)

    async def _ask(
        self, checker: Checker, stage: Stage, contents: Sequence[Any], low: bool
    ) -> Verdict:
        policy = checker.policy
        try:
            async with asyncio.timeout(self._policy.timeout_s):
                scores = await checker.scores(stage, contents)
            thresholds = policy.thresholds(low).items()
            over = sorted(category for category, least in thresholds if scores[category] >= least)
        except TimeoutError:
            reason = f"no answer within {self._policy.timeout_s:g} s"
        except CheckerError as error:
            reason = str(error)
        except Exception as error:
            # Whatever it is, nothing has been checked. Its text may quote a prompt.
            reason = type(error).__name__
        else:
            return Verdict(False, tuple(over), policy.name) if over else Verdict(True)
        logger.error("%s cannot check the %s: %s", policy.name, stage, reason)
        raise CheckerError(f"{policy.name}: {reason}") from None

    async def _load_models(self) -> None:
        places = list(self._models)
        try:
            labels = await self._process.start()
        except ModelLoadError as error:
            answer = error.answer
            index = places[answer.model]
            wrong = getattr(self._models[index], answer.field)
            raise self._error(index, answer.field, f"{wrong}: {answer.reason}") from None
        except (CheckerError, OSError) as error:
            raise ModerationConfigError(
                f"{self._file}: the models cannot be loaded: {error}"
            ) from None
        for index, known in zip(places, labels, strict=True):
            if unknown := sorted(self._models[index].categories.keys() - set(known)):
                message = f"is none of the model's labels: {', '.join(known)}"
                raise self._error(index, f"categories.{unknown[0]}", message)

    def _error(self, index: int, field: str, message: str) -> ModerationConfigError:
        return field_error(self._file, index, self._policy.checkers[index].type, field, message)
