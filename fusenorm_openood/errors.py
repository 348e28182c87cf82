"""The exceptions of this package: each message names the thing, the value found and the way out."""


class FuseNormError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(FuseNormError, ValueError):
    """A setting, a configuration file or a command-line value that cannot be used."""


class TapError(FuseNormError, ValueError):
    """A place in the network that cannot be listened to, or that stayed silent."""


class NotFittedError(FuseNormError, RuntimeError):
    """A score was asked for before the ID statistics were fitted."""


class NonFiniteError(FuseNormError, ValueError):
    """NaN or infinity in images, features or scores."""


class ZeroRangeError(FuseNormError, ValueError):
    """An expert gives (almost) all ID images the same score, so that it cannot be normalised."""


class DataError(FuseNormError, ValueError):
    """An image list, an image or a batch that cannot be read."""


class CheckpointError(FuseNormError, ValueError):
    """A checkpoint that is missing, damaged, or made for another network."""


class DamagedFileError(CheckpointError):
    """A checkpoint whose content is not what was written: truncated, altered, or no checkpoint."""


class OpenOODError(FuseNormError, RuntimeError):
    """Something was asked of OpenOOD that is not to be had here."""
