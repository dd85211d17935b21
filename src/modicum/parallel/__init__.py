"""Several processes as one: started with torchrun, they train one model together."""
