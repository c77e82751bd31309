"""A server of many adapters: the API, the process that has the model, the folder of adapters."""
