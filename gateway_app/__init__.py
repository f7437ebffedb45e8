"""The data plane: key -> limits -> model -> queue -> balancer -> relay bytes -> usage event.

Imports flow one way: asgi, endpoints, rpc -> routing, upstream, limits, metering, directory -> sse, errors.
Of models_app it sees models, contracts and exceptions, nothing else. No request waits on the database or on Celery.
"""
