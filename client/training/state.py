"""What a site keeps between rounds and never sends: its critic and the state of both optimisers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.optim import Optimizer

from client.training.canaries import HEARD, heard_of
from client.training.ladder import Ladder
from common.adversary.critic import Critic, build_critic
from common.adversary.optimisers import critic_optimiser, generator_optimiser, optimiser_tensors, restore_optimiser
from common.errors import IntegrityError
from common.generator.network import StudyGenerator, build_generator, load_weights
from common.generator.weights import Weights
from common.settings.study import Study


@dataclass(frozen=True, kw_only=True, eq=False)
class GameState:
    """Both networks with their optimisers. The generator's weights come with each order; the rest stays here.

    heard: (m,) float64, of each canary over all steps so far; see `client.training.canaries`.
    critic_steps: since the last generator step. ladder: how many are wanted, where the study lets it climb.
    """

    generator: StudyGenerator
    critic: Critic
    generator_optimiser: Optimizer
    critic_optimiser: Optimizer
    heard: Tensor
    critic_steps: int = 0
    ladder: Ladder = field(default_factory=Ladder)

    @property
    def device(self) -> torch.device:
        """Where both networks are."""
        return next(self.critic.parameters()).device

    @classmethod
    def start(cls, study: Study, public_critic: Weights | None, device: str = "cpu") -> GameState:
        """The first round's state: the public critic, or one from a public seed; fresh optimisers."""
        generator = build_generator(study).to(device)
        critic = build_critic(study).to(device)
        if public_critic is not None:
            load_weights(critic, public_critic)
        return cls(
            generator=generator,
            critic=critic,
            generator_optimiser=generator_optimiser(generator.parameters(), study),
            critic_optimiser=critic_optimiser(critic.parameters(), study),
            heard=torch.zeros(study.audit.canaries, dtype=torch.float64),
        )

    def tensors(self) -> dict[str, Tensor]:
        """What must survive between rounds, as named tensors. Stays on the hospital's disk."""
        return {
            **{f"critic.{name}": p.detach().clone() for name, p in self.critic.named_parameters()},
            **optimiser_tensors(self.critic_optimiser, "critic_optimiser"),
            **optimiser_tensors(self.generator_optimiser, "generator_optimiser"),
            **self.ladder.tensors(),
            HEARD: self.heard.clone(),
            "pace.critic_steps": torch.tensor(self.critic_steps),
        }

    @classmethod
    def restore(cls, study: Study, tensors: Mapping[str, Tensor], device: str = "cpu") -> GameState:
        """Inverse of `tensors`. Raises IntegrityError when they are not this study's critic."""
        critic = {
            name.removeprefix("critic."): t.cpu().float().numpy()
            for name, t in tensors.items()
            if name.startswith("critic.")
        }
        try:
            state = cls.start(study, Weights(critic), device)
        except ValueError as error:
            raise IntegrityError(
                "the stored critic does not fit this study; nothing was trained. "
                "The site's state folder belongs to another study or is damaged: restore it from its backup."
            ) from error
        restore_optimiser(state.critic_optimiser, "critic_optimiser", tensors)
        restore_optimiser(state.generator_optimiser, "generator_optimiser", tensors)
        return replace(
            state,
            ladder=Ladder.restore(tensors),
            critic_steps=_critic_steps(tensors),
            heard=heard_of(tensors, study.audit.canaries),
        )


def _critic_steps(tensors: Mapping[str, Tensor]) -> int:
    if "pace.critic_steps" not in tensors:
        raise IntegrityError(
            "the stored critic does not say how many steps it took; nothing was trained. "
            "The site's state folder is damaged: restore it from its backup."
        )
    return int(tensors["pace.critic_steps"])
