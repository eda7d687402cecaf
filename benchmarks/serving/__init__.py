"""The broker beside other servers, over real sockets: cost, overload, fairness, refusals."""
