"""RQ-VAE: an autoencoder whose latent vector is quantized level by level (Zeghidour et al. 2021; TIGER).

Encoder and decoder are small MLPs. Training: the plain autoencoder first, then residual k-means of its
latents as initial codebooks, then both together with the straight-through estimator, a codebook and a
commitment loss per level; a code that no item used for an epoch is put on the residual of a random item.
After training the codebooks are handled by `ResidualKMeans` in latent space, so both kinds share one
definition of assignment. Left out: EMA codebooks, diversity and contrastive losses (LETTER).

I items, B batch, E embedding width, D latent width, L levels, C codebook size.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from lasar.errors import DataError
from lasar.progress import progress
from lasar.sid.kmeans import ResidualKMeans, checked, sinkhorn_offsets, squared_distances

_CHUNK = 8192


class ResidualVae:
    """Residual-quantized variational autoencoder (`rq_vae`).

    Attributes:
        codebooks: the fitted codebooks; they encode and decode latent vectors.
    """

    codebooks: ResidualKMeans

    def __init__(
        self,
        *,
        num_levels: int,
        codebook_size: int,
        seed: int = 0,
        latent_width: int = 64,
        hidden_widths: Sequence[int] = (512, 256),
        num_epochs: int = 100,
        batch_size: int = 1024,
        learning_rate: float = 1e-3,
        commitment: float = 0.25,
        balanced: bool = False,
    ) -> None:
        """Keep the arguments.

        Args:
            num_levels: L.
            codebook_size: C.
            seed: of weights, batches and revivals.
            latent_width: D.
            hidden_widths: hidden layers of the encoder; the decoder mirrors them.
            num_epochs: passes over the items; the first tenth trains the plain autoencoder.
            batch_size: items per step.
            learning_rate: of Adam, cosine to zero.
            commitment: weight of the commitment loss (0.25 in VQ-VAE).
            balanced: add per-code offsets after training, so that codes are loaded evenly.
        """
        self.num_levels = num_levels
        self.codebook_size = codebook_size
        self.seed = seed
        self.latent_width = latent_width
        self.hidden_widths = tuple(hidden_widths)
        self.num_epochs = num_epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.commitment = commitment
        self.balanced = balanced

    def fit(self, item_embeddings_IE: NDArray[np.float32]) -> None:
        """Train on the items.

        Raises:
            DataError: a vector is not finite, or training diverged.
        """
        embeddings = checked(item_embeddings_IE)
        self._mean_E = embeddings.mean(axis=0)
        self._scale = np.asarray(max(float((embeddings - self._mean_E).std()), 1e-12), dtype=np.float32)
        x_IE = torch.from_numpy((embeddings - self._mean_E) / self._scale)
        num_plain = max(1, self.num_epochs // 10)
        with (
            torch.random.fork_rng(devices=[]),
            progress("RQ-VAE", total=self.num_epochs, unit="epochs") as step,
        ):
            torch.manual_seed(self.seed)
            self._build(embeddings.shape[1])
            self._train(x_IE, num_plain, None, step)
            codebooks = self._initial_codebooks(embeddings)
            self._train(x_IE, self.num_epochs - num_plain, codebooks, step)
        if not bool(torch.isfinite(codebooks).all()):
            raise DataError(f"RQ-VAE diverged at learning_rate {self.learning_rate}; lower it")
        centers = codebooks.detach().numpy().copy()
        offsets = np.zeros(centers.shape[:2], dtype=np.float32)
        self._set_codebooks(centers, offsets)
        if self.balanced:
            self._set_codebooks(centers, balanced_offsets(self._latents(embeddings), centers))

    def encode(self, item_embeddings_IE: NDArray[np.float32]) -> NDArray[np.int32]:
        """Codes [I, L] of the nearest latent centers, level by level."""
        return self.codebooks.encode(self._latents(item_embeddings_IE))

    def decode(self, codes_IL: NDArray[np.integer]) -> NDArray[np.float32]:
        """Decoded vectors [I, E] of the codes."""
        latents = torch.from_numpy(self.codebooks.decode(codes_IL))
        with torch.no_grad():
            decoded = [self._decoder(chunk) for chunk in torch.split(latents, _CHUNK)]
        return np.asarray(torch.cat(decoded).numpy() * self._scale + self._mean_E, dtype=np.float32)

    def level_costs(
        self, item_embeddings_IE: NDArray[np.float32], codes_IP: NDArray[np.integer]
    ) -> NDArray[np.float32]:
        """Squared latent distance of each residual to every center of level P: [I, C]."""
        return self.codebooks.level_costs(self._latents(item_embeddings_IE), codes_IP)

    def state(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """Constructor arguments and fitted arrays."""
        arguments = {
            "num_levels": self.num_levels,
            "codebook_size": self.codebook_size,
            "seed": self.seed,
            "latent_width": self.latent_width,
            "hidden_widths": list(self.hidden_widths),
            "num_epochs": self.num_epochs,
            "batch_size": self.batch_size,
            "learning_rate": self.learning_rate,
            "commitment": self.commitment,
            "balanced": self.balanced,
        }
        arrays = {"mean": self._mean_E, "scale": self._scale.reshape(1), **self.codebooks.state()[1]}
        for part, module in (("encoder", self._encoder), ("decoder", self._decoder)):
            arrays |= {f"{part}.{name}": tensor.numpy() for name, tensor in module.state_dict().items()}
        return arguments, arrays

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Take fitted arrays.

        Raises:
            ValueError, RuntimeError: shapes that do not fit the arguments.
        """
        self._mean_E = arrays["mean"]
        self._scale = np.asarray(arrays["scale"][0], dtype=np.float32)
        with torch.random.fork_rng(devices=[]):
            self._build(len(self._mean_E))
        for part, module in (("encoder", self._encoder), ("decoder", self._decoder)):
            names = [name for name in arrays if name.startswith(f"{part}.")]
            module.load_state_dict({n.removeprefix(f"{part}."): torch.from_numpy(arrays[n]) for n in names})
        self._set_codebooks(arrays["centers"], arrays["offsets"])

    def _build(self, width: int) -> None:
        widths = [width, *self.hidden_widths, self.latent_width]
        self._encoder, self._decoder = mlp(widths), mlp(widths[::-1])

    def _set_codebooks(self, centers_LCD: NDArray[np.float32], offsets_LC: NDArray[np.float32]) -> None:
        self.codebooks = ResidualKMeans(num_levels=self.num_levels, codebook_size=self.codebook_size)
        self.codebooks.restore({"centers": centers_LCD, "offsets": offsets_LC})

    def _latents(self, item_embeddings_IE: NDArray[np.float32]) -> NDArray[np.float32]:
        x_IE = torch.from_numpy((checked(item_embeddings_IE) - self._mean_E) / self._scale)
        with torch.no_grad():
            return torch.cat([self._encoder(chunk) for chunk in torch.split(x_IE, _CHUNK)]).numpy()

    def _initial_codebooks(self, embeddings_IE: NDArray[np.float32]) -> nn.Parameter:
        kmeans = ResidualKMeans(
            num_levels=self.num_levels, codebook_size=self.codebook_size, seed=self.seed, num_iterations=10
        )
        kmeans.fit(self._latents(embeddings_IE))
        return nn.Parameter(torch.from_numpy(kmeans.centers_LCE.copy()))

    def _train(self, x_IE: Tensor, num_epochs: int, codebooks_LCD: nn.Parameter | None, advance: Any) -> None:
        """Adam over encoder, decoder and (when given) codebooks; without codebooks the plain autoencoder."""
        parameters = [*self._encoder.parameters(), *self._decoder.parameters()]
        if codebooks_LCD is not None:
            parameters.append(codebooks_LCD)
        optimizer = torch.optim.Adam(parameters, lr=self.learning_rate)
        num_batches = -(-len(x_IE) // self.batch_size)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, num_epochs * num_batches))
        for epoch in range(num_epochs):
            used_LC = torch.zeros(self.num_levels, self.codebook_size, dtype=torch.bool)
            for rows in torch.split(torch.randperm(len(x_IE)), self.batch_size):
                z_BD = self._encoder(x_IE[rows])
                loss = torch.zeros(())
                if codebooks_LCD is not None:
                    z_BD, loss = quantize_straight_through(z_BD, codebooks_LCD, self.commitment, used_LC)
                loss = loss + F.mse_loss(self._decoder(z_BD), x_IE[rows])
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
                schedule.step()
            # Revived codes need time to settle: none in the last tenth.
            if codebooks_LCD is not None and epoch < num_epochs * 0.9:
                self._revive(x_IE, codebooks_LCD, used_LC)
            advance()

    @torch.no_grad()
    def _revive(self, x_IE: Tensor, codebooks_LCD: Tensor, used_LC: Tensor) -> None:
        """Put every code that no item used on the residual of a random item."""
        if bool(used_LC.all()):
            return
        rows = torch.randint(len(x_IE), (min(len(x_IE), 4 * self.codebook_size),))
        residual = self._encoder(x_IE[rows])
        for level, codebook_CD in enumerate(codebooks_LCD):
            dead = torch.nonzero(~used_LC[level]).flatten()
            nearest = torch.cdist(residual, codebook_CD).argmin(dim=1)
            residual_after = residual - codebook_CD[nearest]
            codebook_CD[dead] = residual[torch.randint(len(residual), (len(dead),))]
            residual = residual_after


def quantize_straight_through(
    z_BD: Tensor, codebooks_LCD: Tensor, commitment: float, used_LC: Tensor
) -> tuple[Tensor, Tensor]:
    """Residual quantization that passes the decoder's gradient to the encoder unchanged.

    Args:
        z_BD: encoder output.
        codebooks_LCD: codebooks.
        commitment: weight of the term that pulls the encoder to its codes.
        used_LC: bool; set to True at the codes used.

    Returns:
        the quantized latents [B, D], and codebook + commitment loss (mean over batch and width, sum over
        levels).
    """
    residual_BD = z_BD
    total_BD = torch.zeros_like(z_BD)
    loss = torch.zeros((), dtype=z_BD.dtype)
    for level, codebook_CD in enumerate(codebooks_LCD):
        with torch.no_grad():
            codes_B = torch.cdist(residual_BD, codebook_CD).argmin(dim=1)
            used_LC[level, codes_B] = True
        chosen_BD = codebook_CD[codes_B]
        loss = loss + F.mse_loss(chosen_BD, residual_BD.detach())
        loss = loss + commitment * F.mse_loss(residual_BD, chosen_BD.detach())
        residual_BD = residual_BD - chosen_BD.detach()
        total_BD = total_BD + chosen_BD
    return z_BD + (total_BD - z_BD).detach(), loss


def balanced_offsets(
    latents_ID: NDArray[np.float32], centers_LCD: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Per-code offsets [L, C] that load the codes of every level evenly, centers left as they are."""
    residual = latents_ID.copy()
    offsets = np.zeros(centers_LCD.shape[:2], dtype=np.float32)
    for level, centers in enumerate(centers_LCD):
        costs = squared_distances(residual, centers)
        for sharpness in (2, 4, 8, 16):
            offsets[level] = sinkhorn_offsets(costs, offsets[level], sharpness=sharpness, num_iterations=25)
        residual -= centers[(costs + offsets[level]).argmin(axis=1)]
    return offsets


def mlp(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers with GELU between them."""
    layers: list[nn.Module] = []
    for width_in, width_out in pairwise(widths):
        layers += [nn.Linear(width_in, width_out), nn.GELU()]
    return nn.Sequential(*layers[:-1])
