"""
The instruction of each mteb task that LUSIFER is evaluated on, as the research code has them.

A task has the instruction of its type, unless it stands below `TASKS` or `SEARCHES` with one of its own. No task has
another instruction in another language. [`INSTRUCTIONS`] is the table by the names under which mteb and sentence-
transformers look prompts up. A model that this package composes carries it in its config, and so in its prompts file.
"""

SIMILAR = "Retrieve semantically similar text."
QUESTION = "Given a question, retrieve passages that answer the question."
CLAIM = "Given a claim, retrieve documents that support or refute the claim."
CATEGORY = "Identify the category of the following passages."
ENTAILMENT = "Given a premise, retrieve a hypothesis that is entailed by the premise."

# By task type. Both texts of a pair, and all texts to classify or cluster, are formatted as queries.
TYPES = {
    "BitextMining": SIMILAR,
    "Classification": CATEGORY,
    "Clustering": CATEGORY,
    "MultilabelClassification": CATEGORY,
    "PairClassification": SIMILAR,
    "STS": SIMILAR,
    "Summarization": SIMILAR,
}
# Here the texts that are searched or ranked are formatted as documents.
SEARCH_TYPES = {
    "Reranking": QUESTION,
    "Retrieval": QUESTION,
}

TASKS = {
    CATEGORY: "TERRa",
    ENTAILMENT: "ArEntail FarsTail Ocnli RTE3 XNLI XNLIV2 indonli",
    "Classify a given Amazon customer review text as either counterfactual or not-counterfactual.": (
        "AmazonCounterfactualClassification"
    ),
    "Classify Amazon reviews as positive or negative.": "AmazonPolarityClassification",
    "Classify the emotion expressed in the given Twitter message into one of the following emotions: none, sympathy, "
    "anger, fear, joy, love, sadness, and surprise.": "TweetEmotionClassification",
    "Classify the emotion expressed in the given Twitter message into one of the six emotions:anger, fear, joy, love, "
    "sadness, and surprise.": "EmotionClassification",
    "Classify the following text into one of the following categories: Geopolitical, Personal, Political, Religious, "
    "or Gender abusive.": "BengaliHateSpeechClassification",
    "Classify the given Amazon review into one of five rating categories: Poor, Fair, Good, Very good, Excellent.": (
        "AmazonReviewsClassification"
    ),
    "Classify the given comments as either toxic or not toxic.": "ToxicConversationsClassification",
    "Classify the given text into one of the following categories: identity attack, insult, obscene, severe toxicity, "
    "threat, toxicity": "FinToxicityClassification",
    "Classify the given text into one of the following categories: sarcasm or not sarcasm.": (
        "KorSarcasmClassification"
    ),
    "Classify the intent of the given utterance in task-oriented conversation.": (
        "MTOPDomainClassification MTOPIntentClassification"
    ),
    "Classify the sentiment expressed in the given text as positive or negative.": (
        "ImdbClassification MultilingualSentimentClassification OnlineShopping SentimentAnalysisHindi Waimai"
    ),
    "Classify the sentiment expressed in the given text as positive, negative or neutral.": (
        "AfriSentiClassification IndicSentimentClassification JDReview MultilingualSentiment NaijaSenti "
        "RuReviewsClassification VieStudentFeedbackClassification WisesightSentimentClassification"
    ),
    "Classify the sentiment of a given book review as either positive, negative, or neutral.": "FrenchBookReviews",
    "Classify the sentiment of a given tweet as either positive, negative, or neutral.": (
        "TweetSentimentClassification TweetSentimentExtractionClassification"
    ),
    "Given a online banking query, find the corresponding intents.": "Banking77Classification",
    "Given a user utterance as query, find the user intents.": "MassiveIntentClassification",
    "Given a user utterance as query, find the user scenarios.": "MassiveScenarioClassification",
}
SEARCHES = {
    CLAIM: "ArguAna ClimateFEVER FEVER SciFact TRECCOVID",
    SIMILAR: "AskUbuntuDupQuestions CQADupstackTexRetrieval QuoraRetrieval StackOverflowDupQuestions",
}


def _by_prompt_name() -> dict[str, str]:
    table = dict(TYPES)
    table |= {name: instruction for instruction, names in TASKS.items() for name in names.split()}
    searches = dict(SEARCH_TYPES)
    searches |= {name: instruction for instruction, names in SEARCHES.items() for name in names.split()}
    for name, instruction in searches.items():
        table |= {f"{name}-query": instruction, f"{name}-document": instruction}
    return table


# mteb takes the first of TASK-query or TASK-document, TASK, TYPE-query or TYPE-document, TYPE.
INSTRUCTIONS = _by_prompt_name()
