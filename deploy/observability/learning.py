"""Is it learning? Figures of every SAE, as its run's heads have them."""

from penstock.deploy.observability.panels import RUN, Dashboard, Panel, Query, Row, quantiles

SAE = "{{run}} {{sae}}"
HELD = f"sae_l0{{{RUN}}} / sae_l0_target{{{RUN}}}"
DEAD = f"sae_dead_features{{{RUN}}} / sae_features{{{RUN}}}"

LEARNING = Dashboard(
    name="learning",
    title="Penstock: is it learning?",
    text="Loss, sparsity, reconstruction and dead features of every SAE in training.",
    rows=[
        Row(
            "Now",
            [
                Panel(
                    "Progress",
                    [Query(f"penstock_run_position{{{RUN}}} / penstock_run_positions{{{RUN}}}", "{{run}}")],
                    unit="percentunit",
                    text="Chunks trained on by the newest head, of all that the run reads.",
                    kind="stat",
                    height=5,
                    top=1,
                ),
                Panel(
                    "Runs",
                    [Query("penstock_runs", "{{state}}")],
                    text="Runs by state, by their newest heads.",
                    kind="stat",
                    height=5,
                ),
                Panel(
                    "Rows per second",
                    [
                        Query(
                            f"sum by (run) (rate(sae_train_rows_total{{{RUN}}}[$__rate_interval]))", "{{run}}"
                        )
                    ],
                    unit="rowsps",
                    text="Rows trained on. All SAEs of a run step on each row.",
                    height=5,
                ),
            ],
        ),
        Row(
            "Reconstruction",
            [
                Panel(
                    "Loss",
                    [Query(f'sae_loss{{{RUN}, component="total"}}', SAE)],
                    text="Per row, on scaled rows, over the last window. It falls, fast at first; a rise "
                    "that lasts means a learning rate that is too high or damaged rows.",
                    width=12,
                    log=True,
                ),
                Panel(
                    "Explained variance",
                    [Query(f"sae_explained_variance{{{RUN}}}", SAE)],
                    unit="percentunit",
                    text="1 − residual / total variance over the last window. It rises.",
                    width=12,
                    top=1,
                ),
                Panel(
                    "Parts of the loss",
                    [Query(f'sae_loss{{{RUN}, component!="total"}}', "{{run}} {{sae}} {{component}}")],
                    text="Squared error, penalties and auxiliary losses by name.",
                    width=24,
                    log=True,
                ),
            ],
        ),
        Row(
            "Inside the language model",
            [
                Panel(
                    "Cross-entropy recovered",
                    [Query(f"sae_ce_recovered{{{RUN}}}", SAE)],
                    unit="percentunit",
                    text="Of what zeros in its place would lose, on a few held-out sequences, each time that "
                    "trainer.evaluate_every rows were trained on; empty where that is 0. It rises.",
                    width=12,
                    top=1,
                ),
                Panel(
                    "KL divergence",
                    [Query(f"sae_kl{{{RUN}}}", SAE)],
                    text="In nats per token, from the model's predictions to those with the SAE in place. "
                    "It falls.",
                    width=12,
                    log=True,
                ),
            ],
        ),
        Row(
            "Sparsity",
            [
                Panel(
                    "L0",
                    [Query(f"sae_l0{{{RUN}}}", SAE)],
                    text="Active features per row.",
                    log=True,
                ),
                Panel(
                    "L0 against its target",
                    [Query(HELD, SAE)],
                    unit="percentunit",
                    text="Of SAEs that hold an L0: 100 % is on target. L0OffTarget fires below 75 % and "
                    "above 125 %.",
                    limits={1.25: "red"},
                ),
                Panel(
                    "Dead features",
                    [Query(DEAD, SAE)],
                    unit="percentunit",
                    text="Share of features that were not active for the declared number of rows. None can "
                    "be dead before that many were trained on.",
                    limits={0.2: "orange"},
                ),
            ],
        ),
        Row(
            "Speed",
            [
                Panel(
                    "Steps per second",
                    [Query(f"sum by (run) (rate(sae_steps_total{{{RUN}}}[$__rate_interval]))", "{{run}}")],
                    text="Optimizer steps; each steps all SAEs of the run.",
                ),
                Panel(
                    "Seconds per step",
                    quantiles("sae_step_seconds"),
                    unit="s",
                    text="Of all trainers; a step is that of all SAEs of a run.",
                ),
                Panel(
                    "Time left",
                    [
                        Query(
                            f"(penstock_run_rows_planned{{{RUN}}} - penstock_run_rows{{{RUN}}})"
                            f" / on (run) sum by (run) (rate(sae_train_rows_total{{{RUN}}}[15m]) > 0)",
                            "{{run}}",
                        )
                    ],
                    unit="s",
                    text="At the speed of the last 15 minutes.",
                ),
            ],
        ),
    ],
)
