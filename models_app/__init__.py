"""The control plane: what should run, what runs, who may use it, what was used.

Imports flow one way: admin, api, commands -> tasks -> reconcile, provisioning, health -> lifecycle -> models.
Engines see dataclasses, never the ORM. Services never import tasks: entry points enqueue on commit.
"""
