"""The mixture of the sites' generators: one number of the latent is the public coin that picks the site."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from common.generator.network import generator_from
from common.generator.transversal import code_size
from common.generator.weights import Weights
from common.settings.study import Family, Study

_NEAREST_EDGE = 1e-6  # of a site's share: keeps the spread coin finite


class Mixture:
    """Draws from site i with probability p_i, and then exactly as that site's own generator does.

    The coin is the latent's last number of the image's code, the one that the warm start's components load least on.
    Its normal law is cut into one interval a site, of probability p_i; within its interval it is spread over the whole
    normal law again [inverse transform], so each generator gets standard normal latents. The mixture is therefore a
    function of the latent, as a generator is, and one network can learn it by example.

    generators: by site. site_weights: public weight of each, as in the mean; those of others are ignored.
    Raises ValueError for no generators.
    """

    def __init__(
        self, study: Study, generators: Mapping[str, Weights], site_weights: Mapping[str, float], device: str = "cpu"
    ) -> None:
        if not generators:
            raise ValueError("a mixture has at least one generator")
        self.sites = tuple(sorted(generators))
        self.latent_size = study.training.latent_size
        self._coin = (code_size(self.latent_size) if study.family is Family.TRGAN else self.latent_size) - 1
        self._networks = [generator_from(study, generators[site], device) for site in self.sites]
        shares = torch.tensor([site_weights[site] for site in self.sites], dtype=torch.float64)
        self._edges = torch.cat([torch.zeros(1, dtype=torch.float64), (shares / shares.sum()).cumsum(0)])

    def __call__(self, latent: Tensor) -> Tensor:
        """(N, L) -> pairs (N, 1+K, D, H, W)."""
        chosen, spread = self._toss(latent)
        own = latent.clone()
        own[:, self._coin] = spread
        pairs = [
            network(own[chosen == number]) for number, network in enumerate(self._networks) if (chosen == number).any()
        ]
        order = torch.argsort(chosen, stable=True)
        return torch.cat(pairs)[torch.argsort(order)]

    def site_of(self, latent: Tensor) -> tuple[str, ...]:
        """Whose generator each latent goes to."""
        return tuple(self.sites[number] for number in self._toss(latent)[0].tolist())

    def _toss(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """(N, L) -> number of the site (N,), and the coin spread over the normal law again (N,)."""
        edges = self._edges.to(latent.device)
        place = torch.special.ndtr(latent[:, self._coin].double())
        chosen = torch.bucketize(place, edges[1:-1], right=True)
        inside = (place - edges[chosen]) / (edges[chosen + 1] - edges[chosen])
        spread = torch.special.ndtri(inside.clamp(_NEAREST_EDGE, 1 - _NEAREST_EDGE))
        return chosen, spread.to(latent.dtype)
