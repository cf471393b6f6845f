"""Images against templates: the likelihood of each image, integrated over what is not of interest, batch by batch from the disk."""

from .integrated import integrated_log_likelihood
from .projection import project_volume, read_volume, viewing_directions
from .result import ImageLikelihood
from .streaming import stream_likelihood
from .templates import Templates, displacement_grid

__all__ = [
    "ImageLikelihood",
    "Templates",
    "displacement_grid",
    "integrated_log_likelihood",
    "project_volume",
    "read_volume",
    "stream_likelihood",
    "viewing_directions",
]
