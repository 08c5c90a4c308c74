"""A histogram as a small SVG file that renders wherever images do, in light and dark."""

from html import escape

from penstock.store.statistics import HookStatistics

WIDTH, HEIGHT = 320, 150
LEFT, RIGHT, TOP, BOTTOM = 12, 12, 26, 32
INK, MUTED, BAR, SURFACE = "#1f2328", "#59636e", "#3b6fb6", "#ffffff"
STYLE = "font-family:system-ui,sans-serif;font-size:11px"


def histogram(hook: HookStatistics) -> str:
    """Norms of rows: bars from 0 to the largest, with both ends and the mean named."""
    inner, floor = WIDTH - LEFT - RIGHT, HEIGHT - BOTTOM
    top = float(hook.edges[-1])
    fullest = max(1, int(hook.counts.max(initial=0)))
    width = inner / len(hook.counts)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}" role="img" style="{STYLE}">',
        f"<title>{escape(hook.name)}: norms of rows</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="{SURFACE}"/>',
        f'<text x="{LEFT}" y="16" fill="{INK}">{escape(_short(hook.name))}</text>',
    ]
    for i, count in enumerate(hook.counts):
        height = (floor - TOP) * int(count) / fullest
        if count:
            parts.append(
                f'<rect x="{LEFT + i * width:.2f}" y="{floor - height:.2f}" width="{width - 1:.2f}" '
                f'height="{height:.2f}" fill="{BAR}"/>'
            )
    mean = LEFT + inner * min(1.0, hook.mean_norm / top)
    parts += [
        f'<path d="M{LEFT} {floor}H{WIDTH - RIGHT}" stroke="{MUTED}"/>',
        f'<path d="M{mean:.2f} {TOP}V{floor}" stroke="{INK}" stroke-dasharray="3 2"/>',
        f'<text x="{LEFT}" y="{floor + 14}" fill="{MUTED}">0</text>',
        f'<text x="{WIDTH - RIGHT}" y="{floor + 14}" text-anchor="end" fill="{MUTED}">{top:.3g}</text>',
        f'<text x="{WIDTH / 2:.0f}" y="{HEIGHT - 6}" text-anchor="middle" fill="{MUTED}">'
        f"norm of a row; mean {hook.mean_norm:.3g}</text>",
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _short(name: str) -> str:
    return name if len(name) <= 48 else name[:47] + "…"
