"""What several adapters on one model need: the parts that layers share, finding an adapter's layers, the state of running calls,
operations done as a whole, adapters of other methods, and whether a checkpoint fits. The model and its layers import these. May
import `registration`; what finds, checks or combines an adapter's layers also imports `layer`, `attention` and `starting`, and what
loads and saves imports `config` and `saving`."""
