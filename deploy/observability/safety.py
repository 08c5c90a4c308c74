"""Is it safe? Whether what was done is kept, by one worker each, and whether there is room for more."""

from penstock.deploy.observability.panels import RUN, Dashboard, Panel, Query, Row, quantiles

AGE = f"penstock_run_head_age_seconds{{{RUN}}}"
INTERVAL = f"penstock_run_head_interval_seconds{{{RUN}}}"
FIRING = 'sum by (alertname, severity, run) (ALERTS{alertstate="firing"})'

SAFETY = Dashboard(
    name="safety",
    title="Penstock: is it safe?",
    text="Heads, takeovers, corruption, Redis, disks, and what is firing.",
    rows=[
        Row(
            "Now",
            [
                Panel(
                    "Alerts that fire",
                    [Query(FIRING)],
                    text="Each has a page in docs/runbooks.",
                    kind="table",
                    width=12,
                    height=6,
                ),
                Panel(
                    "Processes scraped",
                    [Query('sum by (job) (up{job=~"producer|trainer|exporter"})', "{{job}}")],
                    kind="stat",
                    width=6,
                    height=6,
                    text="Processes that answered the last scrape.",
                ),
                Panel(
                    "Redis and store answer",
                    [
                        Query("min(penstock_redis_up)", "Redis"),
                        Query("min(penstock_exporter_look_success)", "store"),
                    ],
                    kind="stat",
                    width=6,
                    height=6,
                    text="1 if it answered the exporter's last look.",
                ),
            ],
        ),
        Row(
            "Heads",
            [
                Panel(
                    "Age of the newest head",
                    [Query(AGE, "{{run}}")],
                    unit="s",
                    text="What would be lost and done again if the trainer died now. A saw-tooth is healthy.",
                ),
                Panel(
                    "Age of the newest head, in intervals",
                    [Query(f"{AGE} / {INTERVAL}", "{{run}}")],
                    text="NoHead fires above 5, unless the run waits for data.",
                    limits={5: "red"},
                ),
                Panel(
                    "Committing a head",
                    quantiles("sae_head_commit_seconds"),
                    unit="s",
                    text="Storing the checkpoint and creating the head; training pauses meanwhile.",
                ),
            ],
        ),
        Row(
            "Who holds what",
            [
                Panel(
                    "Runs held",
                    [Query(f"penstock_run_held{{{RUN}}}", "{{run}}")],
                    text="1 while a worker holds the run's lease. Runs that have not ended.",
                    top=1,
                ),
                Panel(
                    "Takeovers",
                    [Query("sum(increase(sae_takeovers_total[$__rate_interval]))", "takeovers")],
                    text="Runs that a worker carried on from a head: after a restart, a hand-over, a death.",
                ),
                Panel(
                    "Workers fenced off",
                    [Query("sum(increase(sae_fenced_total[$__rate_interval]))", "fenced")],
                    text="Workers that found themselves replaced. More than one now and then means that "
                    "workers freeze for longer than their leases.",
                ),
            ],
        ),
        Row(
            "Damage",
            [
                Panel(
                    "Reads that failed their checks",
                    [
                        Query(
                            "sum by (instance) (increase(penstock_chunk_corrupt_total[$__rate_interval]))",
                            "{{instance}}",
                        )
                    ],
                    text="Each chunk is read once more, then made again.",
                ),
                Panel(
                    "Chunks mended and given up",
                    [
                        Query("sum(increase(penstock_chunks_repaired_total[$__rate_interval]))", "mended"),
                        Query("sum by (dataset) (penstock_chunks_quarantined)", "quarantined: {{dataset}}"),
                    ],
                    text="Quarantined chunks are left out by all readers, for good.",
                ),
                Panel(
                    "Feeds rebuilt, Redis commands tried again",
                    [
                        Query(
                            "sum(increase(penstock_queue_rebuilds_total[$__rate_interval]))", "feeds rebuilt"
                        ),
                        Query(
                            "sum(increase(penstock_redis_retries_total[$__rate_interval]))",
                            "commands tried again",
                        ),
                    ],
                    text="A feed is rebuilt when Redis went back in time or lost it.",
                ),
            ],
        ),
        Row(
            "Room",
            [
                Panel(
                    "Free disk",
                    [Query("penstock_store_free_bytes", "{{url}}")],
                    unit="bytes",
                    text="Of the file systems of the work directory and of local stores. LowDisk fires below "
                    "10 GB, or when it will be full within four hours.",
                    width=12,
                ),
                Panel(
                    "Stored",
                    [
                        Query("penstock_store_bytes", "{{url}}"),
                        Query("penstock_store_quota_bytes", "quota of {{url}}", "no quota is set"),
                    ],
                    unit="bytes",
                    text="Bytes below each URL, counted every ten minutes.",
                    width=12,
                ),
            ],
        ),
    ],
)
