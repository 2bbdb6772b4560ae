"""Draw the charts of the page with plotly."""

from .curves import draw_curves
from .heat_map import draw_heat_map
from .histogram import draw_histograms

__all__ = ["draw_curves", "draw_heat_map", "draw_histograms"]
