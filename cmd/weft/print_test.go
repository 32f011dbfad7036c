package main

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"sigs.k8s.io/yaml"

	v1 "github.com/weftmesh/weft/federation/v1"
)

func verdict(cluster string, tier, share int32, ready, total int32, why string) *v1.Verdict {
	return &v1.Verdict{
		Cluster: cluster, Region: "eu", Zone: "a", Tier: tier, SharePerMille: share,
		Readiness: &v1.Readiness{Ready: ready, Total: total}, Why: why,
	}
}

func whyAnswer() *v1.WhyResponse {
	return &v1.WhyResponse{
		Plan: &v1.Plan{
			Revision: &v1.Revision{Incarnation: "ab", Number: 1042}, Namespace: "shop", Name: "payments", Port: 8080,
			CallerCluster: "eu-1", Policy: "shop/regional-first",
			Verdicts: []*v1.Verdict{
				verdict("eu-2", 0, 667, 4, 4, "same region"),
				verdict("eu-1", 0, 333, 1, 2, "same cluster"),
				verdict("us-1", 1, 1000, 2, 2, "standby: another region"),
				verdict("ap-1", -1, 0, 0, 3, "no ready endpoints"),
			},
		},
		Proxies: []*v1.ProxyAck{
			{Name: "gateway-1", Acked: true, Revision: &v1.Revision{Incarnation: "ab", Number: 1042}},
			{Name: "gateway-2", Revision: &v1.Revision{Incarnation: "ab", Number: 1040}},
		},
	}
}

func TestWhyReadsLikeATable(t *testing.T) {
	var out bytes.Buffer
	printWhy(&out, whyAnswer(), false)
	want := `shop/payments:8080  from eu-1   catalog 1042   policy shop/regional-first

TIER  CLUSTER  LOCALITY  READY  SHARE  WHY
0     eu-2     eu/a        4/4  66.7%  same region
0     eu-1     eu/a        1/2  33.3%  same cluster
1     us-1     eu/a        2/2   100%  standby: another region
-     ap-1     eu/a        0/3      -  no ready endpoints

gateway-1 has applied this (acked revision 1042).
gateway-2 has not acknowledged this yet (it is at revision 1040).
`
	if got := out.String(); got != want {
		t.Errorf("got:\n%s\nwant:\n%s", got, want)
	}
}

func TestPredictedWhySaysSo(t *testing.T) {
	r := whyAnswer()
	r.Predicted, r.PredictedBecause = true, "the agent of eu-1 is not connected"
	var out bytes.Buffer
	printWhy(&out, r, false)
	if !strings.Contains(out.String(), "Predicted by the controller: the agent of eu-1 is not connected.") {
		t.Errorf("got:\n%s", out.String())
	}
}

func TestEveryFormatOfAList(t *testing.T) {
	items := []*v1.Finding{
		{Code: "WEFT1001", Severity: v1.Severity_SEVERITY_ERROR, Subject: "export eu-1/shop/payments", Message: "port 8080 conflicts", Fix: "name it alike"},
		{Code: "WEFT2001", Severity: v1.Severity_SEVERITY_WARNING, Subject: "cluster us-1", Message: "silent"},
	}
	for format, check := range map[string]func(t *testing.T, out string){
		"table": func(t *testing.T, out string) {
			if lines := strings.Split(strings.TrimSpace(out), "\n"); len(lines) != 3 || strings.Contains(out, "name it alike") || strings.Contains(out, "\x1b") {
				t.Errorf("got:\n%s", out)
			}
		},
		"wide": func(t *testing.T, out string) {
			if !strings.Contains(out, "name it alike") {
				t.Errorf("got:\n%s", out)
			}
		},
		"name": func(t *testing.T, out string) {
			if out != "finding/WEFT1001/export eu-1/shop/payments\nfinding/WEFT2001/cluster us-1\n" {
				t.Errorf("got:\n%s", out)
			}
		},
		"json": func(t *testing.T, out string) {
			var list struct {
				Kind  string
				Items []struct{ Code string }
			}
			if err := json.Unmarshal([]byte(out), &list); err != nil || list.Kind != "FindingList" || len(list.Items) != 2 || list.Items[0].Code != "WEFT1001" {
				t.Errorf("%v in:\n%s", err, out)
			}
		},
		"yaml": func(t *testing.T, out string) {
			var list struct {
				Items []struct{ Code string }
			}
			if err := yaml.Unmarshal([]byte(out), &list); err != nil || len(list.Items) != 2 {
				t.Errorf("%v in:\n%s", err, out)
			}
		},
	} {
		t.Run(format, func(t *testing.T) {
			var out, errOut bytes.Buffer
			a := &app{out: &out, err: &errOut, format: format}
			if err := printList(a, findingView(), &v1.Revision{Incarnation: "ab", Number: 7}, items, false); err != nil {
				t.Fatal(err)
			}
			check(t, out.String())
		})
	}
}

func TestCheckFoldsWhatAnotherFindingCauses(t *testing.T) {
	list := []*v1.Finding{
		{Code: "WEFT3002", Severity: v1.Severity_SEVERITY_WARNING, Subject: "b", Message: "symptom", DependsOn: []string{"WEFT3001"}},
		{Code: "WEFT3001", Severity: v1.Severity_SEVERITY_ERROR, Subject: "a", Message: "cause", Fix: "mend it"},
	}
	var out bytes.Buffer
	printCheck(&out, list, false)
	if got := out.String(); strings.Contains(got, "symptom") || !strings.Contains(got, "1 more follow") || !strings.Contains(got, "fix: mend it") {
		t.Errorf("folded:\n%s", got)
	}
	out.Reset()
	printCheck(&out, list, true)
	if got := out.String(); !strings.Contains(got, "symptom") || strings.Index(got, "cause") > strings.Index(got, "symptom") {
		t.Errorf("all, errors first:\n%s", got)
	}
}

func TestLineDiff(t *testing.T) {
	got := strings.Join(lineDiff("a\nb\nc\n", "a\nx\nc\nd\n"), "|")
	if want := " a|-b|+x| c|+d"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if got := lineDiff("", ""); len(got) != 0 {
		t.Errorf("nothing against nothing: %q", got)
	}
}

func TestAgeAndShare(t *testing.T) {
	for d, want := range map[time.Duration]string{
		30 * time.Millisecond: "30ms", 90 * time.Second: "90s", 5 * time.Minute: "5m", 3 * time.Hour: "3h", 100 * time.Hour: "4d", -time.Minute: "-60s",
	} {
		if got := age(d); got != want {
			t.Errorf("age(%v) = %q, want %q", d, got, want)
		}
	}
	for n, want := range map[int32]string{1000: "100%", 667: "66.7%", 0: "0%", 5: "0.5%"} {
		if got := perMille(n); got != want {
			t.Errorf("perMille(%d) = %q, want %q", n, got, want)
		}
	}
}

func TestCallShowsThePath(t *testing.T) {
	var out bytes.Buffer
	printCall(&out, "shop/payments", "eu-1", &v1.CallResponse{
		Status: 200, Duration: durationpb.New(3 * time.Millisecond), Body: "{\"cluster\":\"eu-2\"}",
		Access: &v1.Access{Cluster: "eu-2", Gateway: "127.0.2.2:15443", Endpoint: "127.0.2.10:8080", Tier: 1, Attempts: 2, Peer: "spiffe://weft/cluster/eu-2/gateway"},
	})
	for _, want := range []string{"HTTP 200 in 3ms", "eu-1 -> gateway 127.0.2.2:15443 of eu-2 -> endpoint 127.0.2.10:8080", "1, 2", "spiffe://weft/cluster/eu-2/gateway", `{"cluster":"eu-2"}`} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in:\n%s", want, out.String())
		}
	}
}
