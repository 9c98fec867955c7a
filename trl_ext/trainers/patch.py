"""Our classes in TRL's place, for scripts that nobody edits."""

import importlib
import logging
import sys
import warnings

from trl_ext.upstream import names_explained


logger = logging.getLogger(__name__)

# Our classes, and the TRL packages that offer them; those of an experimental package are patched where it is there
STABLE = {"DPOConfig": "trl_ext.trainers.dpo_config", "DPOTrainer": "trl_ext.trainers.dpo"}
ONLINE = {"OnlineDPOConfig": "trl_ext.trainers.online.config", "OnlineDPOTrainer": "trl_ext.trainers.online.trainer"}


def patch_trl() -> None:
    """
    Make `DPOConfig`, `DPOTrainer`, `OnlineDPOConfig` and `OnlineDPOTrainer` this package's classes, wherever TRL offers
    them.

    Call it before a script imports them; `trl-ext run` does. Calling it again changes nothing. Where TRL's online trainer is not
    what ours extends, it stays as it is, and a warning says why.

    Raises:
        ImportError: If the installed TRL or transformers lacks a name that `DPOTrainer` uses.
    """
    import trl
    import trl.trainer
    import trl.trainer.dpo_config
    import trl.trainer.dpo_trainer

    _replace(STABLE, (trl, trl.trainer))
    try:
        with warnings.catch_warnings():  # that it is experimental is for the script that asks for it to hear
            warnings.simplefilter("ignore")
            import trl.experimental.online_dpo as online
    except ImportError:  # a TRL that has dropped it
        return
    try:
        _replace(ONLINE, (online,))
    except ImportError as error:  # `DPOTrainer` works, and it may be all that the script asks for
        logger.warning(f"OnlineDPOTrainer and OnlineDPOConfig stay TRL's own. {error}")


def _replace(classes: dict[str, str], packages: tuple) -> None:
    with names_explained():  # all are loaded before one is replaced
        replacements = {name: getattr(importlib.import_module(origin), name) for name, origin in classes.items()}
    for name, ours in replacements.items():
        for module_name, module in list(sys.modules.items()):
            if (module_name == "trl" or module_name.startswith("trl.")) and name in vars(module):
                setattr(module, name, ours)
        # TRL's packages are lazy: an attribute that nobody asked for yet is not in `vars`
        for package in packages:
            setattr(package, name, ours)
