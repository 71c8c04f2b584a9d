package main

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"encoding/json"
	"errors"
	"net/http"
	"strconv"
	"strings"
	"time"
)

const (
	maxCommand = 4 << 20
	maxWait    = 60.0
)

// api serves clients that hold the token:
//
//	PUT    /commands/N?wait=SECONDS   starts command N unless N was seen; 200 result, 202 while it runs, 409 while another one runs
//	GET    /commands/N?wait=SECONDS   200 result, 202 while it runs, 404 unknown or forgotten
//	DELETE /commands/N                stops it, and returns when nothing of it is left
//	PUT    /files                     unpacks a tar archive at /
//	GET    /files?path=P&limit=BYTES  a regular file's first bytes, or 404
type api struct {
	digest string
	runner *runner
	files  files
}

func (a *api) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if !a.allowed(r) {
		w.Header().Set("Connection", "close")
		http.Error(w, "wrong token", http.StatusUnauthorized)
		return
	}
	visitorOf(r).known()
	switch path := r.URL.Path; {
	case strings.HasPrefix(path, "/commands/"):
		number, err := strconv.ParseUint(strings.TrimPrefix(path, "/commands/"), 10, 64)
		if err != nil {
			http.Error(w, "a command's number is a whole number from 0", http.StatusBadRequest)
			return
		}
		a.command(w, r, number)
	case path == "/files" && r.Method == http.MethodPut:
		a.files.unpack(w, r)
	case path == "/files" && r.Method == http.MethodGet:
		a.files.send(w, r)
	default:
		http.NotFound(w, r)
	}
}

// allowed compares hashes, in constant time: the token itself is not in the pod.
func (a *api) allowed(r *http.Request) bool {
	given := sha256.Sum256([]byte(strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer ")))
	return subtle.ConstantTimeCompare([]byte(hex.EncodeToString(given[:])), []byte(a.digest)) == 1
}

func (a *api) command(w http.ResponseWriter, r *http.Request, number uint64) {
	var known *execution
	var err error
	switch r.Method {
	case http.MethodPut:
		asked := command{}
		if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxCommand)).Decode(&asked); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		known, err = a.runner.start(number, &asked)
	case http.MethodDelete:
		if known, err = a.runner.start(number, nil); err == nil {
			known.cancel()
			<-known.done
		}
	case http.MethodGet:
		if known = a.runner.find(number); known == nil {
			http.Error(w, "no such command", http.StatusNotFound)
			return
		}
	default:
		http.Error(w, "PUT, GET or DELETE", http.StatusMethodNotAllowed)
		return
	}
	if errors.Is(err, busy{}) {
		http.Error(w, err.Error(), http.StatusConflict)
		return
	} else if err != nil {
		http.Error(w, err.Error(), http.StatusGone)
		return
	}
	answer(w, r, known)
}

// answer waits as long as the client asks, and sends the result if there is one by then.
func answer(w http.ResponseWriter, r *http.Request, known *execution) {
	seconds, _ := strconv.ParseFloat(r.URL.Query().Get("wait"), 64)
	if !(seconds >= 0 && seconds <= maxWait) {
		seconds = maxWait
	}
	patience := time.NewTimer(time.Duration(seconds * float64(time.Second)))
	defer patience.Stop()
	select {
	case <-known.done:
	case <-r.Context().Done():
		return
	case <-patience.C:
		w.WriteHeader(http.StatusAccepted)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(known.result)
}
