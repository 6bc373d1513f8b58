"""The LightningModule: loss, optimiser, schedule, metrics. It knows nothing of attention."""

from __future__ import annotations

import math
from typing import Annotated, Any, NoReturn

import torch
import torch.nn.functional as F
from lightning import LightningModule
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from attention_visualizer.files.tensor_files import CHECKPOINT_KEY
from attention_visualizer.support.errors import UserError
from attention_visualizer.support.field_types import SHARE, Bound, check_arguments
from attention_visualizer.support.training_progress import batches_done
from attention_visualizer.training.muon import MuonWithAdamW
from attention_visualizer.training.split_batches import Halves

ABOVE_ZERO = Bound(lambda value: 0 < value < math.inf, "a number above 0, such as 0.001")
NOT_NEGATIVE = Bound(lambda value: 0 <= value < math.inf, "0 or a positive number")


class Classifier(LightningModule):
    """Training of `model`, which maps images to logits, with AdamW, a linear warm-up and a cosine decay to zero.

    warmup_share: the part of all steps in which the learning rate rises linearly. Weight decay leaves biases, norms,
    positions and the class token alone. With `muon`, Muon trains the blocks' matrices, at the same rate. `seed` makes
    the random state of each batch a function of integers, so a resumed run repeats an uninterrupted one. Raise
    UserError for values that cannot train.
    """

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        learning_rate: Annotated[float, ABOVE_ZERO] = 2e-3,
        weight_decay: Annotated[float, NOT_NEGATIVE] = 0.05,
        beta1: Annotated[float, SHARE] = 0.9,
        beta2: Annotated[float, SHARE] = 0.99,
        warmup_share: Annotated[float, SHARE] = 0.05,
        label_smoothing: Annotated[float, SHARE] = 0.05,
        muon: bool = False,
        seed: int = 0,
    ) -> None:
        check_arguments("optimizer", Classifier.__init__, locals())
        super().__init__()
        self.model = model
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.betas = (beta1, beta2)
        self.warmup_share = warmup_share
        self.label_smoothing = label_smoothing
        self.muon = muon
        self.seed = seed
        #: What is stored in every checkpoint beside the weights: see `checkpoint.block_for`.
        self.checkpoint_block: dict[str, Any] | None = None
        #: Trains on both halves of a batch at once, on the CPU and where the model can; None never does.
        self.halves: Halves | None = Halves()
        self.last_loss = self.validation_loss = torch.zeros(())
        # Plain numbers, which a checkpoint within an epoch can hold.
        self.train_right, self.train_images = torch.zeros((), dtype=torch.int64), 0
        self.validation_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_confusion = MulticlassConfusionMatrix(num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)

    def training_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        seed = self.seed * 1_000_003 + batches_done(self.trainer)
        if self.device.type == "cpu":
            torch.default_generator.manual_seed(seed)  # torch.manual_seed looks for GPUs anew, for a millisecond
        else:
            torch.manual_seed(seed)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        if self.halves is not None and self.halves.applies_to(self.model, images):
            loss, logits = self.halves.loss(self.model, self.training_loss, images, labels)
        else:
            logits = self(images)
            loss = self.training_loss(logits, labels)
        self.last_loss = loss.detach()
        self.train_right = self.train_right.to(labels.device) + (logits.detach().argmax(dim=1) == labels).sum()
        self.train_images += len(labels)
        # Handing over what no logger takes costs time, too.
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # 0: no step
        if every > 0 and (self.global_step + 1) % every == 0:
            self.log("train/loss", loss, prog_bar=True)
            self.log("train/learning_rate", self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    def on_train_epoch_end(self) -> None:
        if self.train_images:
            accuracy = {"train/accuracy": float(self.train_right) / self.train_images, "epoch": self.current_epoch}
            for logger in self.loggers:  # at once: `log` writes after the epoch's checkpoint, which must not be ahead
                logger.log_metrics(accuracy, step=self.global_step - 1)
        self.train_right, self.train_images = torch.zeros_like(self.train_right), 0

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise UserError when the loss or a gradient is NaN or infinite, before it gets into the weights."""
        # A GPU would have to be waited for at each step: there, `on_validation_epoch_start` finds it.
        if self.device.type != "cpu" or self.trainer.scaler is not None:
            return
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        if not bool(self.last_loss.isfinite()):
            self.refuse_divergence("the loss")
        if not bool(torch.nn.utils.get_total_norm(gradients).isfinite()):
            self.refuse_divergence("a gradient")

    def on_validation_epoch_start(self) -> None:
        """Raise UserError when training has diverged, before such weights are measured or ranked."""
        finite = all(bool(parameter.isfinite().all()) for parameter in self.model.parameters())
        if not (finite and bool(self.last_loss.isfinite())):
            self.refuse_divergence("the loss or a weight")
        self.validation_loss = torch.zeros((), device=self.device)

    def on_validation_epoch_end(self) -> None:
        """Raise UserError when the validation loss is not finite: finite weights can still be too large."""
        if not bool(self.validation_loss.isfinite()):
            self.refuse_divergence("the validation loss")

    def refuse_divergence(self, what: str) -> NoReturn:
        batch = self.trainer.fit_loop.epoch_loop.batch_idx + 1
        raise UserError(
            f"training diverged: {what} is NaN or infinite at step {self.global_step + 1}, which is batch {batch} of "
            f"epoch {self.current_epoch + 1}; lower optimizer.learning_rate"
        )

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        logits = self(images)
        self.validation_accuracy.update(logits, labels)
        loss = F.cross_entropy(logits, labels)
        self.validation_loss = self.validation_loss + loss
        self.log("validation/loss", loss, batch_size=len(labels), sync_dist=True)
        self.log("validation/accuracy", self.validation_accuracy, prog_bar=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        logits = self(images)
        self.test_accuracy.update(logits, labels)
        self.test_confusion.update(logits, labels)
        self.log("test/loss", F.cross_entropy(logits, labels), batch_size=len(labels), sync_dist=True)
        self.log("test/accuracy", self.test_accuracy)

    def build_optimizer(self, fused: bool = True) -> torch.optim.Optimizer:
        options: dict[str, Any] = {"lr": self.learning_rate, "betas": self.betas, "fused": fused}
        if self.muon:
            return MuonWithAdamW(*muon_groups(self.model, self.weight_decay), **options)
        return torch.optim.AdamW(parameter_groups(self.model, self.weight_decay), **options)

    def configure_optimizers(self) -> Any:
        # A fused one scales gradients back after they would be clipped.
        optimizer = self.build_optimizer(fused=self.trainer.scaler is None)
        num_steps = int(self.trainer.estimated_stepping_batches)
        warmup_steps = max(1, round(self.warmup_share * num_steps))

        def share_of_learning_rate(step: int) -> float:
            if step < warmup_steps:
                return (step + 1) / warmup_steps
            return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup_steps) / max(1, num_steps - warmup_steps))))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share_of_learning_rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as Lightning does, which refuses fused optimisers in mixed precision even where nothing is scaled."""
        plugin = self.trainer.precision_plugin
        if isinstance(plugin, MixedPrecision) and plugin.scaler is None:
            kind = GradClipAlgorithmType(gradient_clip_algorithm or "norm")
            Precision.clip_gradients(plugin, optimizer, gradient_clip_val or 0.0, kind)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.checkpoint_block is None:
            return
        accuracy = self.trainer.callback_metrics.get("validation/accuracy")
        checkpoint[CHECKPOINT_KEY] = {
            **self.checkpoint_block,
            "precision": str(self.trainer.precision),
            "validation_accuracy": None if accuracy is None else float(accuracy),
            "train_right": int(self.train_right),
            "train_images": self.train_images,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Replace the saved optimiser's settings by this classifier's: a resumed run may change them."""
        block = checkpoint.get(CHECKPOINT_KEY, {})
        correct, images = (block.get(name) for name in ("train_right", "train_images"))
        if isinstance(correct, int) and isinstance(images, int):
            self.train_right, self.train_images = torch.tensor(correct), images
        for state in checkpoint.get("optimizer_states", ()):
            for part in state.get("parts", [state]):  # of Muon with AdamW
                for group in part["param_groups"]:
                    initial_lr = group.get("initial_lr", group["lr"])
                    if initial_lr != self.learning_rate:
                        group["lr"] *= self.learning_rate / initial_lr
                        group["initial_lr"] = self.learning_rate
                    group["weight_decay"] = self.weight_decay if group["weight_decay"] else 0.0
                    if "betas" in group:
                        group["betas"] = self.betas
        for schedule in checkpoint.get("lr_schedulers", ()):
            schedule["base_lrs"] = [self.learning_rate for _ in schedule["base_lrs"]]


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Group the parameters: matrices decay; vectors (biases, norms), positions and the class token do not."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    undecayed = {name for name, parameter in named if parameter.ndim < 2 or name.endswith(("pos_embed", "cls_token"))}
    return [
        {"params": [parameter for name, parameter in named if name not in undecayed], "weight_decay": weight_decay},
        {"params": [parameter for name, parameter in named if name in undecayed], "weight_decay": 0.0},
    ]


def muon_groups(model: nn.Module, weight_decay: float) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the groups for Muon, the matrices of the blocks, and for AdamW, all others, with the same decay."""
    decaying, undecayed = parameter_groups(model, weight_decay)
    in_blocks = {id(parameter) for name, parameter in model.named_parameters() if "blocks." in name}
    hidden = [each for each in decaying["params"] if each.ndim == 2 and id(each) in in_blocks]
    if not hidden:
        raise UserError("optimizer.muon: the model has no matrices in `blocks`, which are what Muon is for")
    others = [each for each in decaying["params"] if not any(each is matrix for matrix in hidden)]
    return [{**decaying, "params": hidden}], [{**decaying, "params": others}, undecayed]
