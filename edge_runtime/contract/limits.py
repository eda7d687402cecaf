"""Every bound on input from outside, in one place.

Passing one raises ``LimitExceeded`` or the narrower error named beside it. Sizes are
bytes, times milliseconds, unless the name says otherwise.
"""

from __future__ import annotations

from typing import Final

# Images -----------------------------------------------------------------------
MAX_IMAGE_BYTES: Final = 8 * 2**20
"""One encoded image: a 12-megapixel phone JPEG is about 3 MB. ``ImageTooLarge``."""
MAX_IMAGE_PIXELS: Final = 50_000_000
"""Width x height, read from the header before anything is decoded. ``ImageTooLarge``."""
MAX_IMAGE_SIDE: Final = 32_768
"""Width or height. ``ImageTooLarge``."""
MAX_ASPECT_RATIO: Final = 64
"""Longer over shorter side where a resize keeps the ratio: 32768 x 1 pixels fit into 200
bytes and would grow to gigabytes when the shorter side is scaled up. ``ImageTooLarge``."""

# Bundles and servables --------------------------------------------------------
MAX_MANIFEST_BYTES: Final = 4 * 2**20
MAX_BUNDLE_FILES: Final = 4096
MAX_BUNDLE_FILE_BYTES: Final = 4 * 2**30
MAX_VARIANTS: Final = 64
MAX_PATH_CHARS: Final = 240
MAX_NAME_CHARS: Final = 128
MAX_TEXT_CHARS: Final = 4096
MAX_LABELS: Final = 100_000
MAX_LABEL_CHARS: Final = 256
MAX_LABELS_BYTES: Final = 8 * 2**20

# Tensors ----------------------------------------------------------------------
MAX_TENSOR_RANK: Final = 8
MAX_TENSOR_DIM: Final = 2**20
MAX_TENSOR_ELEMENTS: Final = 2**28
MAX_TENSORS: Final = 64
MAX_ANCHORS: Final = 2**20
MAX_LATENT: Final = 2**20
MAX_MASK_CLASSES: Final = 256
"""A class map is stored as 8-bit pixels."""
MAX_GOLDEN_VALUES: Final = 65_536
"""Numbers of one stored golden output; larger ones are thinned by a stride."""

# Wire -------------------------------------------------------------------------
MAX_DEADLINE_MS: Final = 600_000
DEFAULT_DEADLINE_MS: Final = 1_000
MAX_TOP_K: Final = 1_000
MAX_HEADER_CHARS: Final = 1_024
"""One of our own header values, ``Server-Timing`` included."""
MAX_ANSWER_BYTES: Final = 32 * 2**20
"""What a device reads of one answer."""

# Open Inference Protocol --------------------------------------------------------
MAX_INFER_BYTES: Final = 64 * 2**20
"""The body of one inference request, unpacked where it came compressed. ``ImageTooLarge``."""
MAX_UNPACKED_BYTES: Final = 16 * 2**20
"""A compressed body once unpacked: small uploads must not become much memory.
``ImageTooLarge``."""
MAX_INFER_JSON_BYTES: Final = 8 * 2**20
"""The JSON of one request, tensors in it included. Reading it stops all other requests.
``LimitExceeded``."""
MAX_INFER_ROWS: Final = 64
"""Images, seeds or tensors of one inference request. ``LimitExceeded``."""
MAX_INFER_PARAMETERS: Final = 64
"""Parameters of one request, input or output. ``WireError``."""
MAX_INFER_ID_CHARS: Final = 256
"""The ``id`` that an answer repeats. ``WireError``."""
MAX_INFER_JSON_NUMBERS: Final = 2**18
"""Numbers of one answer in JSON; as binary data there may be more. ``LimitExceeded``."""
MAX_INFER_ANSWER_BYTES: Final = 64 * 2**20
"""Output tensors of one answer. ``LimitExceeded``."""
MAX_CONTROL_BODY_BYTES: Final = 64 * 1024
"""The body of a repository request. ``LimitExceeded``."""
DEFAULT_INFER_DEADLINE_MS: Final = 60_000
"""Of a request that names none: how long the protocol's own clients wait for an answer."""

# Broker -----------------------------------------------------------------------
MAX_BATCH: Final = 256
MAX_QUEUE: Final = 4096
MAX_KEYS_FILE_BYTES: Final = 2**20
MAX_MODELS: Final = 256
MAX_ALIASES: Final = 32
"""Of one model."""
MAX_ROUTING_BYTES: Final = 256 * 1024
"""The file of routing rules, and what is kept of them over a restart. ``ConfigError``."""
MAX_KEYS: Final = 4096
MAX_CONNECTIONS: Final = 65_536
MAX_BATCH_BYTES: Final = 64 * 2**20
"""Encoded images of one batch together."""
MAX_UPLOAD_BYTES_IN_FLIGHT: Final = 512 * 2**20
"""Bodies announced or held at one time. ``Overloaded``."""
MAX_BODY_MS: Final = 30_000
"""Reading one body. ``UploadStalled``."""
MAX_BODY_IDLE_MS: Final = 10_000
"""Between two pieces of a body. ``UploadStalled``."""
MAX_HEADER_BLOCK_MS: Final = 10_000
"""From the first byte of a request to the end of its headers. The connection is closed."""

# Sessions ---------------------------------------------------------------------
SESSION_WINDOW_BYTES: Final = 24 * 1024
"""What a device may have under way on a session beyond what the broker's acknowledgements
prove the link to hold, and so about what a cancel loses; docs/session.md has the rule."""
MAX_DATA_BYTES: Final = 64 * 1024
"""Payload of one DATA frame. ``LimitExceeded``."""
MAX_CONTROL_BYTES: Final = 8 * 1024
"""JSON of one frame. ``LimitExceeded``."""
MAX_FRAME_BYTES: Final = 96 * 1024
"""One frame. ``LimitExceeded``; the connection is closed."""
PROGRESS_EVERY_BYTES: Final = 8 * 1024
"""A PROGRESS frame is sent after so many bytes, at the latest."""
PROGRESS_EVERY_MS: Final = 10
"""And of fewer bytes after so long."""
MAX_SESSIONS: Final = 1024
"""Open at one time. ``Overloaded``."""
MAX_SESSIONS_PER_TENANT: Final = 256
"""Open at one time for one tenant. ``Overloaded``."""
MAX_SESSION_REQUESTS: Final = 32
"""In flight on one session. ``Overloaded``."""
MAX_SESSION_UPLOAD_BYTES: Final = 32 * 2**20
"""Announced and not yet answered, of one session. ``Overloaded``."""
MAX_SESSION_ANSWER_BYTES: Final = 64 * 2**20
"""Answers that wait for a reader, of one session. The connection is closed."""
MAX_HELLO_MS: Final = 5_000
"""From the upgrade to HELLO. The connection is closed."""
MAX_SESSION_IDLE_MS: Final = 300_000
"""Without a frame and without a request in flight. The connection is closed."""
MAX_SESSION_WRITE_MS: Final = 10_000
"""A reader that takes nothing for so long. The connection is closed."""
MAX_REPLAYS_PER_TENANT: Final = 256
"""Idempotency keys that are remembered; the oldest is forgotten first."""
MAX_REPLAY_BYTES: Final = 64 * 2**20
"""Answers kept for a retry, of all tenants together; the oldest is forgotten first."""
REPLAY_TTL_MS: Final = 60_000
"""How long an answer is kept for a retry."""

# Jobs -------------------------------------------------------------------------
MAX_JOBS: Final = 1024
"""Jobs that wait or run, of all tenants together. ``Overloaded``."""
MAX_JOBS_PER_TENANT: Final = 64
"""Jobs of one tenant that wait or run. ``Overloaded``."""
MAX_JOB_BYTES: Final = 256 * 2**20
"""Bodies of jobs that wait or run, of all tenants together. ``Overloaded``."""
MAX_JOB_RESULT_BYTES: Final = 256 * 2**20
"""Answers kept, of all tenants together; the oldest is forgotten first."""
MAX_ENDED_JOBS: Final = 4096
"""Ended jobs that are remembered, of all tenants together; the oldest is forgotten first."""
JOB_RESULT_TTL_MS: Final = 3_600_000
"""How long an ended job and its answer are kept."""
MAX_JOB_ATTEMPTS: Final = 3
"""Runs of one job whose worker was lost, or whose broker stopped. The job has failed then."""
MAX_JOB_STREAMS_PER_TENANT: Final = 64
"""Open event streams of one tenant. ``Overloaded``."""
JOB_HEARTBEAT_MS: Final = 15_000
"""A comment is sent on an event stream after so long without an event."""

# Models to convert --------------------------------------------------------------
MAX_WEIGHTS_BYTES: Final = 4 * 2**30
"""A file of trained weights, unpacked: a billion numbers in 32 bits. ``SourceError``."""

# Evaluation and calibration folders --------------------------------------------
MAX_DATASET_FILES: Final = 200_000
MAX_CSV_BYTES: Final = 64 * 2**20
