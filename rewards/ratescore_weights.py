"""The type weights of RaTEScore 0.6.0 (Zhao et al., EMNLP 2024), found by the authors' search on human ratings.

`LONG` (upstream's default, for whole reports) and `SHORT` hold W[from][to] in the order of TYPES: the weight of an
entity of type `from` whose nearest entity on the other side is of type `to`. The matrices are not symmetric. A match of
an affirmed with a negated type is multiplied by the matching NEGATION weight.
"""

import numpy as np

TYPES = ("ABNORMALITY", "NON-ABNORMALITY", "DISEASE", "NON-DISEASE", "ANATOMY")

LONG = np.array(
    [
        [
            0.4276119164393705,
            0.5431049700217344,
            0.0034478181112993847,
            0.27005425386213877,
            0.6240929990607657,
        ],  # from ABNORMALITY
        [
            0.16546764653692908,
            0.0009357166071730684,
            0.719397354576018,
            0.0927333564267591,
            0.018670610691852826,
        ],  # from NON-ABNORMALITY
        [
            0.8396510075734789,
            0.9820689020512646,
            0.8460555030578727,
            0.3789136708096537,
            0.9950209388542061,
        ],  # from DISEASE
        [
            0.7759420231214385,
            0.03860183811876373,
            0.10073046076318157,
            0.34065681486566446,
            0.1839139293714062,
        ],  # from NON-DISEASE
        [
            0.7487824274337533,
            0.02097055139911715,
            0.4592143222158069,
            0.00013736314126696204,
            0.2856134859160784,
        ],  # from ANATOMY
    ]
)
SHORT = np.array(
    [
        [
            0.4070293318365468,
            0.9479148658006686,
            0.28342529466226446,
            0.23875064111146294,
            0.6952639610605605,
        ],  # from ABNORMALITY
        [
            0.1712744286898638,
            0.0007887930317199857,
            0.00045065329822896076,
            0.8555432840895761,
            0.4485149671497294,
        ],  # from NON-ABNORMALITY
        [
            0.8840397619834857,
            0.6962283914800402,
            0.19018958438059513,
            0.943727057946997,
            0.9637659445696822,
        ],  # from DISEASE
        [
            0.9555801066212176,
            0.05650711141169969,
            0.6072996585919443,
            0.3214769399791204,
            0.13122106162635216,
        ],  # from NON-DISEASE
        [
            0.5829759950441763,
            0.794672584951181,
            0.0006059634829551632,
            0.27982942400798977,
            0.7709590751917746,
        ],  # from ANATOMY
    ]
)

NEGATION = {"long": 0.8716553966489615, "short": 0.3611577852354489}
WEIGHTS = {"long": LONG, "short": SHORT}
