"""What several adapters on one model need: the parts that layers share, finding an adapter's layers, the state of running calls,
the model's state before a change, adapters of other methods, and whether a checkpoint fits. The model and its layers import these. May import `registration`; what finds or
checks an adapter's layers also imports `layer`."""
