from nanovllm_jax.engine.collector import Collector
from nanovllm_jax.engine.request import Request
from nanovllm_jax.engine.stats import EngineStats
from nanovllm_jax.sampling_params import SamplingParams


def test_no_time_passes_between_tokens_that_are_read_together():
    stats = EngineStats()
    collector = Collector(None, frozenset(), stats)
    request = Request("r", [1], SamplingParams())
    request.max_tokens = 10
    collector.add([request], None, stream=False, arrival_time=10.0)
    for tokens, now in (([5], 12.0), ([6, 7, 8, 9], 12.25)):
        assert collector.on_tokens(request, tokens, None, now) == (len(tokens), None, False)
        collector.end_step(now)
    assert stats.num_generation_tokens == 5
    assert (sum(stats.time_to_first_token.counts), stats.time_to_first_token.sum) == (1, 2.0)
    between = stats.inter_token_latency
    assert (sum(between.counts), between.counts[0], between.sum) == (4, 3, 0.25)
