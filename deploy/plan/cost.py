"""What storing costs, against making the rows again for every pass over them."""

from penstock.deploy.plan.record import Plan, Prices


def price(plan: Plan, prices: Prices, hours: float | None, passes: int) -> None:
    """Fill the costs in, as far as prices are given.

    Args:
        hours: that producers take for all rows together; None if that was not measured.
        passes: how often the rows are read.
    """
    if prices.gb_month is None and prices.gpu_hour is None:
        plan.notes.append("cost: give --gb-month and --gpu-hour")
        return
    costs = plan.costs
    costs["passes"] = passes
    if prices.gb_month is not None:
        stored = plan.parts["dataset"]["bytes"] if plan.at_once is None else plan.at_once
        costs |= {"months": prices.months, "storing": stored / 1e9 * prices.gb_month * prices.months}
    else:
        plan.notes.append("cost of storing: give --gb-month")
    if prices.gpu_hour is None or hours is None:
        missing = "give --gpu-hour" if prices.gpu_hour is None else "needs the probe"
        plan.notes.append(f"cost of making the rows: {missing}")
        return
    once = hours * prices.gpu_hour
    costs |= {"producer hours": hours, "making once": once, "made again": passes * once}
    if prices.gb_month is not None:
        # made once and kept
        costs["stored"] = once + costs["storing"]
        if once > 0:
            costs["pays off from passes"] = int(costs["stored"] / once) + 1
