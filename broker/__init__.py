"""The broker: the service that answers the images devices offload to it.

``app`` wires the parts, ``server`` runs them as one process, ``cli`` starts it. ``http``
speaks HTTP, ``scheduling`` decides what runs when, ``executors`` run it, ``models`` opens
what is run, ``accounts`` knows who asks.
"""
