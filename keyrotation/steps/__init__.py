"""The use cases, one module each: look, ask the domain, act through a port, say what happened. They run with and without Prefect."""
