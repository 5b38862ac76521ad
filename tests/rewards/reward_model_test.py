import math

from ftjax.rewards.reward_model import reward_model


def test_the_model_sees_prompts_and_texts_and_its_scores_are_clipped():
    def score(prompts, texts):
        assert (prompts, texts) == (["p", [{"role": "user", "content": "q"}]], ["a", "b"])
        return [3, -40.0]

    columns = {"prompts": ["p", [{"role": "user", "content": "q"}]], "completions": ["a", [{"role": "assistant", "content": "b"}]]}
    assert reward_model(**columns, score=score) == [3.0, -40.0]
    assert reward_model(**columns, score=score, clip=10.0) == [3.0, -10.0]


def test_clipping_does_not_hide_a_nan():
    assert math.isnan(reward_model(["p"], ["a"], score=lambda prompts, texts: [float("nan")], clip=1.0)[0])
