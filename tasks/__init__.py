"""The Prefect skin of the steps: names, retries, progress, artifacts. What a step does is in keyrotation/steps."""
