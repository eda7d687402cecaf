"""Every error that nearfar raises on purpose.

    NearfarError
    ├── ConfigError                 a setting, flag or argument makes no sense
    ├── ContractError               something breaks a published format
    │   ├── ManifestError           manifest.json or servable.json
    │   ├── WireError               an HTTP header, body or frame
    │   │   ├── MediaTypeUnsupported  a body of a type or coding nobody takes
    │   │   └── UploadStalled       a body that stopped arriving
    │   ├── LimitExceeded           a bound of contract/limits.py
    │   ├── TensorError             shape, dtype or layout of a tensor
    │   └── ImageError              bytes that are no usable image
    │       ├── ImageUnreadable     not an image, truncated, corrupt
    │       ├── ImageTooLarge       too many bytes or pixels
    │       ├── ImageAnimated       more than one frame
    │       └── ImageModeUnsupported  CMYK, 16-bit, translucent
    ├── TrustError                  a file is not what its manifest says
    │   ├── DigestMismatch          other bytes than recorded
    │   ├── MissingFile             listed, not there
    │   ├── UnlistedFile            there, not listed
    │   ├── UnsafePath              would leave the bundle
    │   └── LabelsMismatch          device and cloud models name other classes
    ├── RuntimeFault                an interpreter on this device
    │   ├── BackendUnavailable      the interpreter is not installed
    │   ├── ModelLoadError          the file does not load
    │   └── InferenceError          the model ran and failed
    ├── RemoteError                 the broker, or the way to it
    │   ├── NetworkUnreachable      no connection, or it broke
    │   ├── DeadlineExceeded        the answer would come, or came, too late
    │   ├── CircuitOpen             recent failures; not tried
    │   ├── Unauthorized            no key, or not a valid one
    │   ├── ModelNotFound           the broker has no such model
    │   ├── RequestRejected         the broker found the request wrong (4xx)
    │   ├── Overloaded              the broker said no (503)
    │   │   └── RateLimited         this key asks too often (429)
    │   ├── WorkerLost              the process that ran the model died
    │   ├── JobNotFound             the broker has no such job, or not any more
    │   ├── JobNotReady             the job has no answer yet
    │   ├── JobCanceled             the job was canceled before its answer
    │   └── BrokerFault             the broker failed (5xx, or made no sense)
    └── ConversionError             from a trained model to a bundle
        ├── SourceError             the model cannot be built
        ├── WeightsMismatch         the weights do not fit the model
        ├── WeightsUnavailable      a download is needed and there is no network
        ├── UnsupportedOperator     this format has no such operator
        ├── PrecisionRefused        this format has no such precision
        ├── CalibrationError        calibration data: none, wrong, or leaking
        ├── EvaluationError         evaluation data: none, wrong, or leaking
        ├── ReferenceMissing        nothing to compare with
        └── GateFailed              a variant is not good enough

Each class carries a stable ``code`` (for machines), ``retryable`` (may the same
request succeed later, unchanged?) and ``detail`` (a sentence for people that
ends with what to do). HTTP statuses are not here: see ``broker/http/errors.py``.
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "BackendUnavailable",
    "BrokerFault",
    "CalibrationError",
    "CircuitOpen",
    "ConfigError",
    "ContractError",
    "ConversionError",
    "DeadlineExceeded",
    "DigestMismatch",
    "EvaluationError",
    "GateFailed",
    "ImageAnimated",
    "ImageError",
    "ImageModeUnsupported",
    "ImageTooLarge",
    "ImageUnreadable",
    "InferenceError",
    "JobCanceled",
    "JobNotFound",
    "JobNotReady",
    "LabelsMismatch",
    "LimitExceeded",
    "ManifestError",
    "MediaTypeUnsupported",
    "MissingFile",
    "ModelLoadError",
    "ModelNotFound",
    "NearfarError",
    "NetworkUnreachable",
    "Overloaded",
    "PrecisionRefused",
    "RateLimited",
    "ReferenceMissing",
    "RemoteError",
    "RequestRejected",
    "RuntimeFault",
    "SourceError",
    "TensorError",
    "TrustError",
    "Unauthorized",
    "UnlistedFile",
    "UnsafePath",
    "UnsupportedOperator",
    "UploadStalled",
    "WeightsMismatch",
    "WeightsUnavailable",
    "WireError",
    "WorkerLost",
    "error_from_code",
]


class NearfarError(Exception):
    """Root of every error that nearfar raises on purpose."""

    code: ClassVar[str] = "nearfar"
    retryable: ClassVar[bool] = False

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail


class ConfigError(NearfarError):
    """A setting, flag or argument makes no sense."""

    code = "config"


class ContractError(NearfarError):
    """Something breaks a published format."""

    code = "contract"


class ManifestError(ContractError):
    """``manifest.json`` or ``servable.json`` breaks its schema or its own rules."""

    code = "manifest"


class WireError(ContractError):
    """A header, body or frame on the wire makes no sense."""

    code = "wire"


class MediaTypeUnsupported(WireError):
    """The body has a media type or content coding that is not taken."""

    code = "media_type_unsupported"


class UploadStalled(WireError):
    """The body stopped arriving before its end."""

    code = "upload_stalled"
    retryable = True


class LimitExceeded(ContractError):
    """A bound of ``contract/limits.py`` is passed."""

    code = "limit_exceeded"


class TensorError(ContractError):
    """A tensor has another shape, dtype or layout than declared."""

    code = "tensor"


class ImageError(ContractError):
    """These bytes are no usable image."""

    code = "image"


class ImageUnreadable(ImageError):
    """Not an image, or truncated, or corrupt."""

    code = "image_unreadable"


class ImageTooLarge(ImageError):
    """Too many bytes, or too many pixels once decoded."""

    code = "image_too_large"


class ImageAnimated(ImageError):
    """More than one frame."""

    code = "image_animated"


class ImageModeUnsupported(ImageError):
    """CMYK, 16-bit or translucent pixels: no single right way to 8-bit RGB."""

    code = "image_mode_unsupported"


class TrustError(NearfarError):
    """A file is not what its manifest says."""

    code = "trust"


class DigestMismatch(TrustError):
    """A file has other bytes than recorded."""

    code = "digest_mismatch"


class MissingFile(TrustError):
    """A listed file is not there."""

    code = "missing_file"


class UnlistedFile(TrustError):
    """A file is there that the manifest does not list."""

    code = "unlisted_file"


class UnsafePath(TrustError):
    """A path would leave the bundle, or is ambiguous between file systems."""

    code = "unsafe_path"


class LabelsMismatch(TrustError):
    """The cloud model names other classes than the bundle."""

    code = "labels_mismatch"


class RuntimeFault(NearfarError):
    """An interpreter on this device failed."""

    code = "runtime"


class BackendUnavailable(RuntimeFault):
    """The interpreter, or an extra that a command needs, is not installed."""

    code = "backend_unavailable"


class ModelLoadError(RuntimeFault):
    """The model file does not load."""

    code = "model_load"


class InferenceError(RuntimeFault):
    """The model loaded, ran and failed."""

    code = "inference"


class RemoteError(NearfarError):
    """The broker, or the way to it, failed."""

    code = "remote"
    retryable = True


class NetworkUnreachable(RemoteError):
    """No connection to the broker, or it broke."""

    code = "network_unreachable"


class DeadlineExceeded(RemoteError):
    """The answer would come, or came, after the deadline."""

    code = "deadline_exceeded"


class CircuitOpen(RemoteError):
    """The broker failed recently; it was not tried."""

    code = "circuit_open"


class Unauthorized(RemoteError):
    """No API key was sent, or not a valid one."""

    code = "unauthorized"
    retryable = False


class ModelNotFound(RemoteError):
    """The broker has no model of this name and version."""

    code = "model_not_found"
    retryable = False


class RequestRejected(RemoteError):
    """The broker found the request itself wrong."""

    code = "request_rejected"
    retryable = False


class Overloaded(RemoteError):
    """The broker cannot take this request now."""

    code = "overloaded"


class RateLimited(Overloaded):
    """This key makes more requests than it may."""

    code = "rate_limited"


class WorkerLost(RemoteError):
    """The process that ran the model died or hung; another one takes its place."""

    code = "worker_lost"


class JobNotFound(RemoteError):
    """The broker has no job of this id for this caller, or has it no more."""

    code = "job_not_found"
    retryable = False


class JobNotReady(RemoteError):
    """The job has no answer yet."""

    code = "job_not_ready"


class JobCanceled(RemoteError):
    """The job was canceled before it had an answer."""

    code = "job_canceled"
    retryable = False


class BrokerFault(RemoteError):
    """The broker failed, or its answer made no sense."""

    code = "broker_fault"


class ConversionError(NearfarError):
    """From a trained model to a bundle: something failed."""

    code = "conversion"


class SourceError(ConversionError):
    """The source model cannot be built."""

    code = "source"


class WeightsMismatch(ConversionError):
    """The weights do not fit the model."""

    code = "weights_mismatch"


class WeightsUnavailable(ConversionError):
    """Weights must be downloaded and the network is not there."""

    code = "weights_unavailable"
    retryable = True


class UnsupportedOperator(ConversionError):
    """The target format has no such operator."""

    code = "unsupported_operator"


class PrecisionRefused(ConversionError):
    """The target format has no such precision, or it would do nothing."""

    code = "precision_refused"


class CalibrationError(ConversionError):
    """Calibration data are missing, unusable, or overlap the evaluation data."""

    code = "calibration"


class EvaluationError(ConversionError):
    """Evaluation data are missing, mislabeled, or were used for calibration."""

    code = "evaluation"


class ReferenceMissing(ConversionError):
    """There is nothing to compare the variants with."""

    code = "reference_missing"


class GateFailed(ConversionError):
    """A variant is not good enough."""

    code = "gate_failed"


def _descendants(root: type[NearfarError]) -> list[type[NearfarError]]:
    found = [root]
    for child in root.__subclasses__():
        found.extend(_descendants(child))
    return found


def error_from_code(code: str, detail: str) -> NearfarError:
    """Rebuild an error that crossed a process border as ``(code, detail)``.

    A code of another nearfar version becomes the root class, never an exception here.
    """
    for cls in _descendants(NearfarError):
        if cls.code == code:
            return cls(detail)
    return NearfarError(f"[{code}] {detail}")
