"""Build the trained model that a SOURCE names: torchvision, Keras, a file, the zoo.

Importing this package imports no torch; ``load_source`` does, in a child process only.
"""

from converters.sources.labels import read_labels_file
from converters.sources.load import load_source
from converters.sources.types import Detector, Source

__all__ = ["Detector", "Source", "load_source", "read_labels_file"]
