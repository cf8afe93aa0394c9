"""What LongAct does to a model: finding the projections, their statistics, their salient sets, their gradients."""
