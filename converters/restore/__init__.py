"""Give int8 its accuracy back: simulate it, find the layers that suffer, choose what to keep."""
