"""Lightning by the name that the user's project imports it by: the packages `lightning` and `pytorch_lightning` are the
same code, and a project may have only one of them."""

from __future__ import annotations

import importlib.util
import sys
from typing import TYPE_CHECKING

ONLY_THE_OTHER_IS_IMPORTED = "pytorch_lightning" in sys.modules and "lightning" not in sys.modules

if not TYPE_CHECKING and (ONLY_THE_OTHER_IS_IMPORTED or importlib.util.find_spec("lightning") is None):
    try:
        from pytorch_lightning import Callback, LightningModule, Trainer
    except ModuleNotFoundError as error:
        if error.name == "pytorch_lightning":
            error.name = "lightning"  # the one of the two to install
        raise
    from pytorch_lightning.callbacks import ModelCheckpoint
    from pytorch_lightning.loggers import Logger, TensorBoardLogger
    from pytorch_lightning.loggers.logger import DummyLogger
    from pytorch_lightning.trainer.states import RunningStage
    from pytorch_lightning.utilities import CombinedLoader
    from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_warn
else:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.loggers import Logger, TensorBoardLogger
    from lightning.pytorch.loggers.logger import DummyLogger
    from lightning.pytorch.trainer.states import RunningStage
    from lightning.pytorch.utilities import CombinedLoader
    from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

__all__ = [
    "Callback",
    "CombinedLoader",
    "DummyLogger",
    "LightningModule",
    "Logger",
    "ModelCheckpoint",
    "RunningStage",
    "TensorBoardLogger",
    "Trainer",
    "rank_zero_info",
    "rank_zero_warn",
]
