"""The Prometheus metrics of every process. Base units; no per-chunk or per-feature labels.

They say what this process does. What is stored, whoever stored it, is published by the exporter
(`deploy/exported.py`), so that no two processes publish the same.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

REGISTRY = CollectorRegistry()
"""The process's registry: only our own metrics, so that every name in it is documented here."""

_RUN, _SAE = ["run"], ["run", "sae"]
_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)

sae_loss = Gauge("sae_loss", "Training loss per row, by component", [*_SAE, "component"], registry=REGISTRY)
sae_l0 = Gauge("sae_l0", "Mean active features per row", _SAE, registry=REGISTRY)
sae_l0_target = Gauge(
    "sae_l0_target", "Active features per row that training holds, if it holds any", _SAE, registry=REGISTRY
)
sae_features = Gauge("sae_features", "Features of an SAE", _SAE, registry=REGISTRY)
sae_dead_features = Gauge(
    "sae_dead_features",
    "Features not active in the declared window of rows",
    _SAE,
    registry=REGISTRY,
)
sae_dead_window_rows = Gauge(
    "sae_dead_window_rows",
    "Rows without activity after which a feature is dead",
    _SAE,
    registry=REGISTRY,
)
sae_explained_variance = Gauge(
    "sae_explained_variance", "1 − residual / total variance over a window", _SAE, registry=REGISTRY
)
sae_ce_recovered = Gauge(
    "sae_ce_recovered",
    "Cross-entropy recovered against zero ablation, on held-out text, at the last evaluation",
    _SAE,
    registry=REGISTRY,
)
sae_kl = Gauge(
    "sae_kl",
    "KL(clean || with the SAE) of next-token distributions in nats, on held-out text, at the last evaluation",
    _SAE,
    registry=REGISTRY,
)
sae_train_rows = Counter("sae_train_rows", "Rows trained on", _RUN, registry=REGISTRY)
sae_steps = Counter("sae_steps", "Optimizer steps", _RUN, registry=REGISTRY)
sae_step_seconds = Histogram(
    "sae_step_seconds", "Seconds per step of all SAEs of a run", buckets=_SECONDS, registry=REGISTRY
)
sae_window_seconds = Histogram(
    "sae_window_seconds", "Seconds per window", buckets=_SECONDS, registry=REGISTRY
)
sae_data_wait_seconds = Counter(
    "sae_data_wait_seconds", "Seconds a run waited for rows", _RUN, registry=REGISTRY
)
sae_head_commit_seconds = Histogram(
    "sae_head_commit_seconds",
    "Seconds to upload and commit a head",
    buckets=_SECONDS,
    registry=REGISTRY,
)
sae_takeovers = Counter("sae_takeovers", "Runs taken over from a head", registry=REGISTRY)
sae_takeover_timestamp_seconds = Gauge(
    "sae_takeover_timestamp_seconds",
    "When this worker took its run over from a head, in Unix time",
    _RUN,
    registry=REGISTRY,
)
sae_run_failed_timestamp_seconds = Gauge(
    "sae_run_failed_timestamp_seconds",
    "When this worker ended a run as failed, in Unix time, and why: not finite, given up",
    ["run", "reason"],
    registry=REGISTRY,
)
sae_fenced = Counter("sae_fenced", "Times this worker found itself replaced", registry=REGISTRY)

chunks_committed = Counter("penstock_chunks_committed", "Chunks committed", registry=REGISTRY)
chunk_write_seconds = Histogram(
    "penstock_chunk_write_seconds",
    "Seconds to store and commit a chunk",
    buckets=_SECONDS,
    registry=REGISTRY,
)
chunk_read_seconds = Histogram(
    "penstock_chunk_read_seconds",
    "Seconds to read and check a chunk",
    buckets=_SECONDS,
    registry=REGISTRY,
)
chunk_corrupt = Counter(
    "penstock_chunk_corrupt", "Reads of chunks that failed their checks", registry=REGISTRY
)
chunks_repaired = Counter("penstock_chunks_repaired", "Damaged chunks made whole again", registry=REGISTRY)
producer_rows = Counter("penstock_producer_rows", "Rows captured and committed", registry=REGISTRY)
producer_blocked_seconds = Counter(
    "penstock_producer_blocked_seconds",
    "Seconds a producer could not work",
    ["reason"],
    registry=REGISTRY,
)
object_retries = Counter(
    "penstock_object_retries", "Object store requests tried again", ["op"], registry=REGISTRY
)
redis_retries = Counter("penstock_redis_retries", "Redis commands tried again", registry=REGISTRY)
BLOCKED_REASONS = ("redis", "budget", "claimed by others", "store")
"""Why a producer cannot work. Rates want counters from the start on."""
for _reason in BLOCKED_REASONS:
    producer_blocked_seconds.labels(_reason)

queue_rebuilds = Counter("penstock_queue_rebuilds", "Feeds rebuilt from the store", registry=REGISTRY)
build_info = Gauge("penstock_build_info", "Always 1", ["version", "torch"], registry=REGISTRY)
