"""The exceptions of this package; each message names the thing, the value found and the way out."""


class FuseNormError(Exception):
    """Base class of all errors that this package raises deliberately."""


class ConfigError(FuseNormError, ValueError):
    """An invalid setting, configuration file or command-line value."""


class TapError(FuseNormError, ValueError):
    """A module that cannot be tapped, or that was never called."""


class NetworkError(TapError, RuntimeError):
    """The network itself fails on images, for example on ones with another number of channels."""


class NotFittedError(FuseNormError, RuntimeError):
    """A score was requested before the ID statistics were fitted."""


class NonFiniteError(FuseNormError, ValueError):
    """NaN or infinity in images, features or scores."""


class ZeroRangeError(FuseNormError, ValueError):
    """An expert that gives (almost) all ID images the same score, and so cannot be normalised."""


class DataError(FuseNormError, ValueError):
    """An image list, an image or a batch that cannot be read."""


class UnwritableError(FuseNormError, OSError):
    """A file that cannot be written, for example because the disk is full."""

    def __str__(self) -> str:
        reason = f"{self.filename} cannot be written ({self.strerror})"
        return f"{reason}: free disk space, or write elsewhere"


class RemoteError(FuseNormError, RuntimeError):
    """A URL that cannot be read now, which says nothing about what it names."""


class ClusterError(FuseNormError, RuntimeError):
    """A cluster that cannot be reached, lacks resources, or whose workers end again and again."""


class CheckpointError(FuseNormError, ValueError):
    """A checkpoint that is missing, damaged, or made for another network."""


class DamagedFileError(CheckpointError):
    """A file that is truncated or altered, or not a checkpoint at all."""


class OpenOODError(FuseNormError, RuntimeError):
    """OpenOOD is missing or broken, or does not support what was requested."""


class CalibrationError(FuseNormError, ValueError):
    """Calibration images that are missing, too few, or not new to the detector."""


class DetectorFileError(FuseNormError, ValueError):
    """A detector file that is missing, damaged, of a newer format, or of another network."""


class StoreError(FuseNormError, ValueError):
    """A set of stored scores that cannot be written or read, is incomplete, or has another key."""


class DamagedShardError(StoreError):
    """A stored shard that is truncated, altered or unreadable: delete it and compute it again."""


class ExportError(FuseNormError, RuntimeError):
    """A detector that cannot be exported, or whose exported program gives other confidences."""


def is_lost_loader(error: BaseException | None) -> bool:
    """Whether an error says that a process of a data loader ended.

    PyTorch has no exception of its own for that, and none if it ends while it passes on a batch.
    """
    said = isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker ")
    return said or isinstance(error, ConnectionError | EOFError)
