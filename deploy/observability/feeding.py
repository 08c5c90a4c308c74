"""Is it fed? From producers over the store to trainers: who waits for whom."""

from penstock.deploy.observability.panels import (
    RUN,
    Dashboard,
    Panel,
    Query,
    Row,
    quantiles,
)

WAIT = f"sum by (run) (rate(sae_data_wait_seconds_total{{{RUN}}}[$__rate_interval]))"
BLOCKED = "sum by (reason) (rate(penstock_producer_blocked_seconds_total[$__rate_interval]))"

FEEDING = Dashboard(
    name="feeding",
    title="Penstock: is it fed?",
    text="Whether trainers wait for rows, and whether producers wait for anything.",
    rows=[
        Row(
            "Trainers",
            [
                Panel(
                    "Share of time waiting for data",
                    [Query(WAIT, "{{run}}")],
                    unit="percentunit",
                    text="Near 0 training is the bottleneck, near 100 % producing is: add producers, or take "
                    "the trainer away. StarvingTrainer fires above 50 %.",
                    limits={0.5: "red"},
                    top=1,
                ),
                Panel(
                    "Backlog",
                    [Query(f"penstock_backlog_chunks{{{RUN}}}", "{{run}}")],
                    text="Chunks stored that come next in the reading order: what a run can train on before "
                    "it must wait.",
                ),
                Panel(
                    "Workers",
                    [
                        Query("sum by (kind) (penstock_workers)", "{{kind}}s"),
                        Query("sum by (kind) (penstock_workers_waiting)", "{{kind}}s that wait"),
                    ],
                    text="By what they last said of themselves in Redis.",
                ),
            ],
        ),
        Row(
            "Producers",
            [
                Panel(
                    "Rows per second",
                    [
                        Query(
                            "sum by (instance) (rate(penstock_producer_rows_total[$__rate_interval])) > 0",
                            "{{instance}}",
                        )
                    ],
                    unit="rowsps",
                    text="Rows captured and committed, by producer.",
                    stacked=True,
                ),
                Panel(
                    "What blocks them",
                    [Query(BLOCKED, "{{reason}}")],
                    text="Seconds per second, of all producers together. `store`: storing is slower than the "
                    "model. `budget`: the runs are behind. `redis`: it does not answer. `claimed by others`: "
                    "nothing is left to do.",
                    stacked=True,
                ),
                Panel(
                    "Dataset",
                    [
                        Query(
                            "penstock_dataset_chunks_committed / penstock_dataset_chunks_planned",
                            "{{dataset}}",
                        ),
                    ],
                    unit="percentunit",
                    text="Chunks committed, of those planned.",
                    top=1,
                ),
                Panel(
                    "Chunks to make",
                    [
                        Query("penstock_dataset_chunks_wanted", "could be made now"),
                        Query("penstock_dataset_chunks_claimed", "being made"),
                        Query("penstock_dataset_blocked", "blocked by the budget"),
                    ],
                    text="What producers could work on, and do.",
                ),
                Panel(
                    "Chunks committed per minute",
                    [Query("60 * sum(rate(penstock_chunks_committed_total[$__rate_interval]))", "chunks")],
                    text="By all producers.",
                ),
                Panel(
                    "Runs pending",
                    [Query("penstock_runs_pending", "runs that have not ended")],
                    text="One trainer is of use for each.",
                ),
            ],
        ),
        Row(
            "Store",
            [
                Panel(
                    "Reading a chunk",
                    quantiles("penstock_chunk_read_seconds"),
                    unit="s",
                    text="Reading and checking, by trainers. What is ready in time costs no waiting.",
                ),
                Panel(
                    "Storing a chunk",
                    quantiles("penstock_chunk_write_seconds"),
                    unit="s",
                    text="All its objects and its commit.",
                ),
                Panel(
                    "Requests tried again",
                    [
                        Query(
                            "sum by (op) (rate(penstock_object_retries_total[$__rate_interval]))",
                            "objects: {{op}}",
                            "every request was answered at once",
                        ),
                        Query("sum(rate(penstock_redis_retries_total[$__rate_interval]))", "Redis"),
                    ],
                    unit="reqps",
                    text="A few are no matter; many explain slow reads and writes.",
                ),
            ],
        ),
    ],
)
