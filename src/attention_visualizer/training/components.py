"""What a run trains, built from its config: data, model, classifier."""

from __future__ import annotations

from dataclasses import dataclass

from lightning import seed_everything
from omegaconf import DictConfig, OmegaConf

from attention_visualizer.attention.model_search import find_model
from attention_visualizer.attention.undisturbed import undisturbed
from attention_visualizer.data.datamodule import ImageDataModule
from attention_visualizer.models.vision_transformer import VisionTransformer
from attention_visualizer.models.vit_config import ViTConfig
from attention_visualizer.runs import checkpoint
from attention_visualizer.support import allocator, machine
from attention_visualizer.support.errors import UserError
from attention_visualizer.training.classifier import Classifier
from attention_visualizer.training.configuration import arguments, check_options, check_schedule, with_values


@dataclass(frozen=True)
class Components:
    """The parts of a run that its config describes."""

    #: The config with what depends on the data set filled in, read-only.
    config: DictConfig
    data: ImageDataModule
    model: VisionTransformer
    classifier: Classifier
    num_parameters: int


def build_components(config: DictConfig) -> Components:
    """Load the data and build the model. Raise UserError for whatever is wrong with them; write nothing."""
    check_options(config)
    allocator.keep_freed_memory()
    seed_everything(config.seed, verbose=False)
    data = ImageDataModule(**arguments(config, "data"), seed=config.seed)
    architecture = ViTConfig(**arguments(config, "model"))
    machine.check_memory(architecture.num_parameters)
    model = VisionTransformer(architecture)
    recipe = arguments(config, "optimizer")
    data.load()
    check_model_fits_data(model, data)
    classifier = Classifier(model, architecture.num_classes, **recipe, seed=config.seed)
    check_watched_part(config, classifier, data)
    classifier.checkpoint_block = checkpoint.block_for(
        architecture,
        data.description,
        data_dir=str(data.data_dir.absolute()),
        split_seed=data.split_seed,
        seed=config.seed,
    )
    max_epochs = config.trainer.max_epochs or data.default_epochs
    config = with_values(config, {"data.batch_size": data.batch_size, "trainer.max_epochs": max_epochs})
    evaluation_batches = {"validation": len(data.val_dataloader()), "test": len(data.test_dataloader())}
    check_schedule(config, data.batches_in(config.trainer.limit_train_batches), evaluation_batches)
    return Components(config, data, model, classifier, architecture.num_parameters)


def check_model_fits_data(model: VisionTransformer, data: ImageDataModule) -> None:
    """Raise UserError where the image size, channels or number of classes of model and data differ."""
    description = data.description
    fields = ("img_size", "in_channels", "num_classes")
    needed = (description.image_size, description.channels, description.num_classes)
    for field, value in zip(fields, needed, strict=True):
        if model.config[field] != value:
            raise UserError(
                f"model.{field}={model.config[field]} does not fit the data set {description.name}, which needs {value}"
            )


def check_watched_part(config: DictConfig, classifier: Classifier, data: ImageDataModule) -> None:
    """Raise UserError where the attention logger is to watch a model without attention."""
    name = OmegaConf.select(config, "callbacks.attention_logger.model")
    if name is not None:
        images, _ = next(data.evaluation_batches("validation"))
        with undisturbed(classifier):
            find_model(classifier, images[:1], name)
