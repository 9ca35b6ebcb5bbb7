"""The training trial: does a model trained on the selection do better on held-out pairs than one trained on others?"""
