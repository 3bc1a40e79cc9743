"""What a running server counts, for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

REGISTRY = CollectorRegistry()
STREAMS = Gauge("rcm_jax_streams", "Videos that are being made", registry=REGISTRY)
WAITING = Gauge("rcm_jax_waiting", "Readers that wait for one", registry=REGISTRY)
CONNECTIONS = Gauge("rcm_jax_connections", "Readers connected", registry=REGISTRY)
REFUSALS = Counter("rcm_jax_refused", "Connections refused", ["why"], registry=REGISTRY)
ENDED = Counter("rcm_jax_ended", "Streams that ended", ["how"], registry=REGISTRY)
CHUNKS = Counter("rcm_jax_chunks", "Chunks delivered", registry=REGISTRY)
FRAMES = Counter("rcm_jax_frames", "Frames delivered", registry=REGISTRY)
BYTES = Counter("rcm_jax_video_bytes", "Bytes of video delivered", registry=REGISTRY)
MEMORY = Gauge("rcm_jax_memory_bytes", "Memory in use: the device's, or the process's", registry=REGISTRY)
TIMES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
FIRST = Histogram("rcm_jax_first_chunk_seconds", "From the opening of a stream to its first video", registry=REGISTRY,
                  buckets=TIMES)  # fmt: skip
CHUNK = Histogram("rcm_jax_chunk_seconds", "From the beginning of a chunk's making to its video", registry=REGISTRY,
                  buckets=TIMES)  # fmt: skip
TOGETHER = Histogram("rcm_jax_streams_together", "Streams whose chunks are made at once", registry=REGISTRY,
                     buckets=(1, 2, 4, 8, 16, 32))  # fmt: skip
