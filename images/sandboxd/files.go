package main

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
)

const maxUpload = 256 << 20

// files transfers files in and out with the rights of commands, and no others.
type files struct{}

// unpack writes the regular files and folders of a tar archive; names are relative to /.
func (files) unpack(w http.ResponseWriter, r *http.Request) {
	archive := tar.NewReader(http.MaxBytesReader(w, r.Body, maxUpload))
	for {
		header, err := archive.Next()
		if errors.Is(err, io.EOF) {
			return
		}
		if err == nil {
			err = write(filepath.Join("/", header.Name), header, archive)
		}
		if err != nil {
			http.Error(w, err.Error(), http.StatusUnprocessableEntity)
			return
		}
	}
}

func write(path string, header *tar.Header, content io.Reader) error {
	switch header.Typeflag {
	case tar.TypeDir:
		return os.MkdirAll(path, 0o755)
	case tar.TypeReg:
	default:
		return fmt.Errorf("%s: only files and folders are taken", path)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	// Remove what is there first, so that a link is replaced, not followed, and a pipe cannot block us.
	if err := syscall.Unlink(path); err != nil && err != syscall.ENOENT && err != syscall.EISDIR {
		return &os.PathError{Op: "replace", Path: path, Err: err}
	}
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	_, err = io.Copy(file, content)
	if closing := file.Close(); err == nil {
		err = closing
	}
	return err
}

// send sends a regular file's first bytes; links to one are followed.
func (files) send(w http.ResponseWriter, r *http.Request) {
	path, limit := r.URL.Query().Get("path"), int64(0)
	limit, err := strconv.ParseInt(r.URL.Query().Get("limit"), 10, 64)
	if err != nil || limit < 0 {
		http.Error(w, "limit has to be a number of bytes", http.StatusBadRequest)
		return
	}
	// Without O_NONBLOCK, opening a pipe without a writer would block before its type can be checked.
	file, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		http.Error(w, err.Error(), http.StatusNotFound)
		return
	}
	defer file.Close()
	if status, err := file.Stat(); err != nil || !status.Mode().IsRegular() {
		http.Error(w, path+" is no regular file", http.StatusNotFound)
		return
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	_, _ = io.Copy(w, io.LimitReader(file, limit))
}
