"""REST admin API under /api/v1/: thin views over the services; field names are the models'."""
